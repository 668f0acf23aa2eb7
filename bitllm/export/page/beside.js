// Two models -------------------------------------------------------------------------------------

/** One of the models: its column and, where it was trained on conversations, its history. */
class Side {
  constructor(place) {
    this.place = place;
    this.told = models[place];
    const column = document.querySelectorAll("#columns section")[place];
    this.talk = column.querySelector(".talk");
    this.speed = column.querySelector(".speed");
    column.querySelector("h2").textContent = this.told.facts.name;
    this.talk.setAttribute("aria-label", `Conversation with ${this.told.facts.name}`);
    this.begin();
  }
  begin() {
    this.turns = [];
    this.noted = false;
    this.talk.replaceChildren();
    this.speed.textContent = "";
  }
  /** Answer, or continue the text of a model for texts; return why it ended, as `goOn`. */
  async answer(text, signal, seed) {
    const { talk, place, speed } = this, chats = this.told.chat, history = this.turns;
    history.push({ role: "user", content: text });
    const asked = chats && bubble(talk, "user", text), said = bubble(talk, "assistant", "");
    talk.setAttribute("aria-busy", "true"); // the answer is read out once it is complete
    let answered = "", failure = null;
    const show = (piece) => changed(talk, () => { answered += piece; said.append(piece); });
    if (!chats) said.append(quoted(text));
    talk.scrollTop = talk.scrollHeight;
    try {
      await ready;
      const options = { place, seed, speed, cache_prompt: Boolean(chats) };
      return await goOn(chats ? this.prompt(history, asked) : text, signal, show, options);
    } catch (error) {
      failure = error;
      throw error;
    } finally {
      if (answered || !failure) {
        history.push({ role: "assistant", content: answered });
      } else { // nothing was answered: as if nothing had been said
        history.pop();
        for (const part of [asked, said]) part?.parentElement.remove();
      }
      talk.setAttribute("aria-busy", "false");
    }
  }
  prompt(history, asked) {
    const kept = fittingIn(this.told, this.tokenizer, history);
    if (kept !== history && !this.noted) {
      this.noted = true;
      noteTheLength(this.talk, asked, this.told.context);
    }
    return this.tokenizer.text(kept);
  }
}

/** The words that a model continues. */
function quoted(text) {
  const words = document.createElement("span");
  words.className = "prompt";
  words.textContent = text;
  return words;
}

const sides = [new Side(0), new Side(1)];

/** A model's file as llama.cpp is given it. */
async function prepared(file, place) {
  const { chat } = models[place];
  if (chat) [sides[place].tokenizer, file] = await tokenized(file, chat);
  return file;
}

let conversation = 0;

/** Ask one after the other. What ends one answer in an error leaves the other alone. */
async function reply() {
  const text = cleaned(at("prompt").value);
  if (running || broken || !text) return;
  const controller = new AbortController(), seed = chosenSeed(), mine = conversation;
  const reasons = [], said = () => sides.reduce((sum, side) => sum + side.turns.length, 0);
  const before = said();
  let failure = null;
  busy(controller);
  at("prompt").value = "";
  for (const side of sides) {
    if (controller.signal.aborted) break;
    try {
      reasons.push(await side.answer(text, controller.signal, seed));
    } catch (error) {
      failure = error;
      if (error?.name !== "AbortError") error.message = `${side.told.facts.name}: ${error.message}`;
    }
  }
  busy(null);
  if (mine !== conversation) return say("Ready.");
  if (failure) ended(failure);
  else if (reasons.includes("length")) say("Done: an answer reached the length limit.");
  else say("Done.");
  if (said() === before) at("prompt").value ||= text;
}

function begin() {
  conversation += 1;
  running?.abort();
  for (const side of sides) side.begin();
  if (!broken && !running) say("Ready.");
  at("prompt").focus();
}

listen(reply, begin);

// What is known about both
const second = document.createElement("dl");
at("facts").after(second);
describe(models[1].facts, second);
for (const [i, list] of [at("facts"), second].entries()) {
  const name = document.createElement("p");
  name.className = "told";
  name.textContent = models[i].facts.name;
  list.before(name);
}
