// A conversation ---------------------------------------------------------------------------------

/**
 * The history that fits into the context, as `Chat.prompt` in bitllm/chat.py chooses it: the oldest
 * turns are dropped whole, until one of the user is the first. Of one turn that is longer than the
 * context, the end is kept.
 */
function fittingIn({ chat, context }, tokenizer, history) {
  const length = () => tokenizer.conversation(kept).length;
  let kept = history;
  while (length() > chat.room && kept.length > 1) {
    const next = kept.findIndex((turn, i) => i && turn.role === "user");
    kept = kept.slice(next > 0 ? next : -1);
  }
  if (length() < context) return kept;
  while (length() > chat.room && kept[0].content) {
    const [{ role, content }] = kept;
    kept = [{ role, content: cleaned(content.slice(Math.ceil(content.length / 8))) }];
  }
  return kept;
}

/** Show what somebody said; return the element that holds it. */
function bubble(talk, role, text) {
  const turn = document.createElement("div"), who = document.createElement("span");
  const said = document.createElement("p");
  turn.className = `turn ${role}`;
  who.className = "unseen";
  who.textContent = role === "user" ? "You:" : "The model:";
  said.className = "said";
  said.textContent = text;
  turn.append(who, said);
  talk.append(turn);
  return said;
}

/** Keep the end in view, unless somebody has scrolled away from it to read. */
function changed(talk, change) {
  const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
  change();
  if (follows) talk.scrollTop = talk.scrollHeight;
}

function noteTheLength(talk, before, context) {
  const note = document.createElement("p");
  note.className = "note soft";
  note.textContent = `The conversation is longer than the model's ${number(context)} tokens ` +
    "of context: from here on its beginning is left out.";
  changed(talk, () => before.parentElement.before(note));
}

/** Send by the button or Enter, begin anew by the other button. */
function listen(reply, begin) {
  at("form").addEventListener("submit", (event) => { event.preventDefault(); reply(); });
  at("new").addEventListener("click", begin);
  at("prompt").addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // the latter in Safari
    if (event.key !== "Enter" || event.shiftKey || composing) return;
    event.preventDefault();
    at("form").requestSubmit();
  });
}

