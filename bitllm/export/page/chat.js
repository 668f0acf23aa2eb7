// The conversation -----------------------------------------------------------------------------

let turns = [], noted = false;

/**
 * The history that fits into the context, as `Chat.prompt` in bitllm/chat.py chooses it: the oldest
 * turns are dropped whole, until one of the user is the first. Of one turn that is longer than the
 * context, the end is kept.
 */
function fitting(history) {
  const length = () => tokenizer.conversation(kept).length;
  let kept = history;
  while (length() > told.chat.room && kept.length > 1) {
    const next = kept.findIndex((turn, i) => i && turn.role === "user");
    kept = kept.slice(next > 0 ? next : -1);
  }
  if (length() < told.context) return kept;
  while (length() > told.chat.room && kept[0].content) {
    const [{ role, content }] = kept;
    kept = [{ role, content: cleaned(content.slice(Math.ceil(content.length / 8))) }];
  }
  return kept;
}

/** Show what somebody said; return the element that holds it. */
function bubble(role, text) {
  const turn = document.createElement("div"), who = document.createElement("span");
  const said = document.createElement("p");
  turn.className = `turn ${role}`;
  who.className = "unseen";
  who.textContent = role === "user" ? "You:" : "The model:";
  said.className = "said";
  said.textContent = text;
  turn.append(who, said);
  at("talk").append(turn);
  return said;
}

/** Keep the end in view, unless somebody has scrolled away from it to read. */
function changed(change) {
  const talk = at("talk");
  const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
  change();
  if (follows) talk.scrollTop = talk.scrollHeight;
}

function noteTheLength(before) {
  noted = true;
  const note = document.createElement("p");
  note.className = "note soft";
  note.textContent = `The conversation is longer than the model's ${number(told.context)} tokens ` +
    "of context: from here on its beginning is left out.";
  changed(() => before.parentElement.before(note));
}

async function reply() {
  const text = cleaned(at("prompt").value);
  if (running || broken || !text) return;
  const controller = new AbortController(), history = turns;
  const current = () => history === turns; // no new conversation since
  busy(controller);
  at("prompt").value = "";
  history.push({ role: "user", content: text });
  const asked = bubble("user", text), said = bubble("assistant", "");
  at("talk").setAttribute("aria-busy", "true"); // the answer is read out once it is complete
  at("talk").scrollTop = at("talk").scrollHeight;
  const show = (piece) => changed(() => said.append(piece));
  let failure = null;
  try {
    await ready;
    const kept = fitting(history);
    if (kept !== history && !noted && current()) noteTheLength(asked);
    const options = { cache_prompt: true };
    const reason = await goOn(tokenizer.text(kept), controller.signal, show, options);
    say(reason === "stop" ? "Done." : "Done: it reached the length limit.");
  } catch (error) {
    failure = error;
    if (current()) ended(error);
    else say("Ready.");
  }
  if (said.textContent || !failure) {
    history.push({ role: "assistant", content: said.textContent });
  } else if (current()) { // nothing was answered: as if nothing had been said
    history.pop();
    for (const part of [asked, said]) part.parentElement.remove();
    at("prompt").value ||= text;
  }
  at("talk").setAttribute("aria-busy", "false");
  busy(null);
}

function begin() {
  turns = [];
  noted = false;
  running?.abort();
  at("talk").replaceChildren();
  at("speed").textContent = "";
  if (!broken && !running) say("Ready.");
  at("prompt").focus();
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); reply(); });
at("new").addEventListener("click", begin);
at("prompt").addEventListener("keydown", (event) => {
  const composing = event.isComposing || event.keyCode === 229; // the latter in Safari
  if (event.key !== "Enter" || event.shiftKey || composing) return;
  event.preventDefault();
  at("form").requestSubmit();
});
