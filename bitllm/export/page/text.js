const prepared = (file) => file; // for llama.cpp

async function write() {
  if (running) return;
  const controller = new AbortController();
  busy(controller);
  const prompt = at("prompt").value;
  const written = document.createTextNode(""), begun = document.createElement("span");
  begun.className = "prompt";
  begun.textContent = prompt;
  at("text").replaceChildren(begun, written);
  const show = (piece) => { written.data += piece; };
  try {
    const options = { cache_prompt: false };
    const reason = await goOn(prompt || told.end, controller.signal, show, options);
    say(reason === "stop" ? "Done: the model ended its text here."
      : "Done: it reached the length limit.");
  } catch (error) {
    ended(error);
  } finally {
    busy(null);
  }
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); write(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
