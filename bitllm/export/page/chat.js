// One model --------------------------------------------------------------------------------------

const talk = at("talk");
let tokenizer = null, turns = [], noted = false;

/** The model's file as llama.cpp is given it. */
async function prepared(file) {
  [tokenizer, file] = await tokenized(file, told.chat);
  return file;
}

const fitting = (history) => fittingIn(told, tokenizer, history);

async function reply() {
  const text = cleaned(at("prompt").value);
  if (running || broken || !text) return;
  const controller = new AbortController(), history = turns;
  const current = () => history === turns; // no new conversation since
  busy(controller);
  at("prompt").value = "";
  history.push({ role: "user", content: text });
  const asked = bubble(talk, "user", text), said = bubble(talk, "assistant", "");
  talk.setAttribute("aria-busy", "true"); // the answer is read out once it is complete
  talk.scrollTop = talk.scrollHeight;
  const show = (piece) => changed(talk, () => said.append(piece));
  let failure = null;
  try {
    await ready;
    const kept = fitting(history);
    if (kept !== history && !noted && current()) {
      noted = true;
      noteTheLength(talk, asked, told.context);
    }
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
  talk.setAttribute("aria-busy", "false");
  busy(null);
}

function begin() {
  turns = [];
  noted = false;
  running?.abort();
  talk.replaceChildren();
  at("speed").textContent = "";
  if (!broken && !running) say("Ready.");
  at("prompt").focus();
}

listen(reply, begin);
