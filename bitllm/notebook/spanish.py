"""What `say` and `retold` look up for Spanish, keyed by the English texts."""

TEXTS = {
    # the form: form.py
    "a form: run this cell to see it": "un formulario: ejecuta esta celda para verlo",
    "text to learn": "texto que aprende",
    "a file, a folder, a known data set, or hf:OWNER/NAME": (
        "un archivo, una carpeta, un conjunto de datos conocido o hf:OWNER/NAME"
    ),
    "size": "tamaño",
    "how large a model, on how much text": "qué tamaño tiene el modelo y cuánto texto lee",
    "minutes": "minutos",
    "how long it may train; without a size, they choose one": (
        "cuánto puede entrenar; si no eliges tamaño, lo deciden los minutos"
    ),
    "width": "anchura",
    "numbers per token inside the model; larger is slower and better": (
        "números por token dentro del modelo; con más es mejor y más lento"
    ),
    "layers": "capas",
    "how many blocks follow one another": "cuántos bloques hay, uno tras otro",
    "tokens per step": "tokens por paso",
    "how much text the model reads before it changes": (
        "cuánto texto lee el modelo antes de cambiar"
    ),
    "learning rate": "tasa de aprendizaje",
    "how far a step changes the weights, at its highest": (
        "cuánto cambia los pesos un paso, como máximo"
    ),
    "a run that is there": "lo ya entrenado",
    "resume continues it; start over moves it aside": (
        "puedes continuarlo, o apartarlo y empezar de cero"
    ),
    "run folder": "carpeta",
    "where the model is kept; empty: one for each choice": (
        "dónde se guarda el modelo; vacía: una para cada elección"
    ),
    "copies in": "copias en",
    "a second folder for checkpoints, such as one on Google Drive": (
        "una segunda carpeta para los puntos de control, por ejemplo en Google Drive"
    ),
    "Paste a text of your own here: 100 kB or more make sense. Empty: what is chosen below.": (
        "Pega aquí un texto tuyo, mejor de 100 kB o más. Vacío: lo que se elige abajo."
    ),
    "your own text": "tu propio texto",
    "or upload a text": "o sube un texto",
    "Who the companion is; empty fields stay as shown in grey:": (
        "Quién es el compañero; un campo vacío vale lo que se ve en gris:"
    ),
    "name": "nombre",
    "home": "casa",
    "likes": "gustos",
    "maker": "creador",
    "motto": "lema",
    "what suits this machine": "lo adecuado para esta máquina",
    "{name}: {million:.1f}M parameters": "{name}: {million:.1f}M de parámetros",
    "resume it": "continuarlo",
    "start over": "empezar de cero",
    "Advanced": "Avanzado",
    "Train": "Entrenar",
    "or Run all: the notebook trains what is chosen here": (
        "o ejecútalo todo: el cuaderno entrena lo que está elegido aquí"
    ),
    "chosen": "elegido",
    "{minutes:g}, without a GPU": "{minutes:g}, sin GPU",
    "{steps:,} steps": "{steps:,} pasos",
    "none": "ninguna",
    "{label} {value}: use {expected}": "{label} {value}: usa {expected}",
    "not possible: {error}": "no es posible: {error}",
    "Preparing the text: some ten seconds.": "Preparando el texto: unos diez segundos.",
    # its summary: settings.py, runs.py
    " (small and short: there is no GPU here)": " (pequeño y breve: aquí no hay GPU)",
    "chosen for this text, these minutes and this machine": (
        "elegido para este texto, estos minutos y esta máquina"
    ),
    "model": "modelo",
    "{million:.2f}M parameters: {layers} layers of width {width}, context {context}": (
        "{million:.2f}M de parámetros: {layers} capas de anchura {width}, contexto {context}"
    ),
    "data": "datos",
    "companion": "compañero",
    "as its language has it": "el de su idioma",
    "training": "ajustes",
    "{minutes:g} minutes": "{minutes:g} minutos",
    "{steps}, {count:,} tokens per step, peak learning rate {rate:g}": (
        "{steps}, {count:,} tokens por paso, tasa de aprendizaje máxima {rate:g}"
    ),
    "memory": "memoria",
    "{size:,.0f} MB for weights, gradients and optimizer, plus activations": (
        "{size:,.0f} MB para pesos, gradientes y optimizador, más las activaciones"
    ),
    "time": "tiempo",
    "none: this run is complete": "ninguno: este entrenamiento está completo",
    "{minutes:g} minutes in all, however often it is stopped and resumed": (
        "{minutes:g} minutos en total, por muchas veces que se pare y continúe"
    ),
    "about {time} on this {device} (rough estimate)": (
        "aprox. {time} en esta {device} (estimación)"
    ),
    "new": "nueva",
    "holds a run, which is moved aside": "tiene un entrenamiento, que se aparta",
    "HOLDS A RUN WITH OTHER SETTINGS; choose another folder, or start over": (
        "TIENE UN ENTRENAMIENTO CON OTROS AJUSTES; elige otra carpeta o empieza de cero"
    ),
    "{status}, from {place}": "{status}, de {place}",
    ", which will be read {times:,.0f} times and learned by heart": (
        ", que se leerán {times:,.0f} veces y se aprenderán de memoria"
    ),
    "SHORT: about {tokens:,} tokens{often};": "CORTO: unos {tokens:,} tokens{often};",
    "100 kB or more make sense": "mejor con 100 kB o más",
    "{step:,} of {steps:,} steps": "{step:,} de {steps:,} pasos",
    "{steps} done; will resume": "{steps} hechos; continuará",
    "complete ({steps})": "completo ({steps})",
    "ended early ({steps})": "terminado antes ({steps})",
    "{hours:.1f} hours": "{hours:.1f} horas",
    "{days:.1f} days": "{days:.1f} días",
    # the live display: display.py, card.py, figures.py, watch.py
    "Stop": "Parar",
    "Pause": "Pausar",
    "Continue": "Continuar",
    "Save now": "Guardar ahora",
    "buttons: Stop, Pause, Save now": "botones: Parar, Pausar, Guardar ahora",
    "Stop and ■ (interrupt) both save first.": "Parar y ■ (interrumpir) guardan antes.",
    "Getting ready: the first step takes longest.": (
        "Preparando: el primer paso es el que más tarda."
    ),
    "Training": "Entrenando",
    "Paused: press Continue.": "En pausa: pulsa Continuar.",
    "Stopping: saving ...": "Parando: guardando ...",
    "Stopped at {steps}, saved in {place}. To resume, run this cell again.": (
        "Parado en el {steps}, guardado en {place}. Para continuar, ejecuta de nuevo esta celda."
    ),
    "Complete already: {step:,} steps, in {place}. {verdict} To train longer give more minutes; "
    'to start over choose "start over" under Advanced.': (
        "Ya está completo: {step:,} pasos, en {place}. {verdict} Para entrenar más, da más "
        "minutos; para repetirlo, elige «empezar de cero» en Avanzado."
    ),
    " at {steps}: it got no better": ", en el {steps}: ya no mejoraba",
    "Done in {time}{early}. {verdict} Saved in {place}. Try it below.": (
        "Listo en {time}{early}. {verdict} Guardado en {place}. Pruébalo abajo."
    ),
    "Perplexity {perplexity:,.1f} (random guessing: {vocab_size:,}).": (
        "Perplejidad {perplexity:,.1f} (al azar: {vocab_size:,})."
    ),
    "It began to learn its text by heart: more text, or fewer steps, would help.": (
        "Empezó a aprenderse el texto de memoria: ayudarían más texto o menos pasos."
    ),
    "step": "paso",
    "step {step}": "paso {step}",
    "step {step:,}": "paso {step:,}",
    "{step:,} of {steps:,}": "{step:,} de {steps:,}",
    "step {step:,} of {steps:,}": "paso {step:,} de {steps:,}",
    "step {step:,} at {time}": "paso {step:,} a las {time}",
    "validated at": "validada en el",
    "about {time} left": "quedan aprox. {time}",
    "time left": "falta",
    "done": "listo",
    "stopped": "parado",
    "last save": "último guardado:",
    "mirror": "copia:",
    "progress": "progreso",
    "loss": "pérdida",
    "on the text it learns from": "en el texto del que aprende",
    "validation loss": "pérdida de validación",
    "on text it has not seen, {where}": "en texto que no ha visto, {where}",
    "speed": "velocidad",
    "tokens/s": "tokens/s",
    "tokens per second": "tokens por segundo",
    "what it says at step {step:,}": "lo que dice en el paso {step:,}",
    "If this page is closed or reloaded, training continues. To see it again, run "
    "<code>{code}</code> in another notebook.": (
        "Si cierras o recargas esta página, el entrenamiento continúa. Para verlo de nuevo, "
        "ejecuta <code>{code}</code> en otro cuaderno."
    ),
    "text it learns from": "texto del que aprende",
    "text it has not seen": "texto que no ha visto",
    "loss, nats per token": "pérdida, nats por token",
    "loss by step, on the text it learns from and on text it has not seen": (
        "la pérdida por paso, en el texto del que aprende y en texto que no ha visto"
    ),
    "zeros and flips of the ternary weights by layer, and learning rate": (
        "ceros y cambios de los pesos ternarios por capa, y tasa de aprendizaje"
    ),
    "Details: what the weights do": "Detalles: lo que hacen los pesos",
    "Each weight is -1, 0 or 1. A network that is still learning keeps changing them; they "
    "freeze as the learning rate falls.": (
        "Cada peso es -1, 0 o 1. Una red que aún aprende los cambia sin parar; se quedan fijos "
        "cuando baja la tasa de aprendizaje."
    ),
    "weights that are 0": "pesos que son 0",
    "weights that changed since the last point": "pesos que cambiaron desde el último punto",
    "layer": "capa",
    "Training in {place}": "Entrenando en {place}",
    "Getting ready": "Preparando",
    "Stopped: {steps}, saved in {place}.": "Parado: {steps}, guardado en {place}.",
    "Done: {steps}, in {place}.": "Listo: {steps}, en {place}.",
    "no longer watching; the training continues": "ya no se sigue; el entrenamiento continúa",
    # a chat, a prompt, two models: boxes.py, beside.py
    "temperature": "temperatura",
    "0: always the likeliest word; higher: more varied, less sensible": (
        "0: siempre la palabra más probable; más alta: más variedad, menos sentido"
    ),
    "top-k": "top-k",
    "choose among this many likeliest tokens; 0: among all": (
        "elegir entre este número de tokens, los más probables; 0: entre todos"
    ),
    "top-p": "top-p",
    "choose among the likeliest tokens that reach this probability together": (
        "elegir entre los tokens más probables que juntos alcanzan esta probabilidad"
    ),
    "length": "longitud",
    "how long an answer may become, in tokens (pieces of words)": (
        "lo larga que puede ser una respuesta, en tokens (trozos de palabras)"
    ),
    "seed": "semilla",
    "a number: the same answer each time; empty: a new one": (
        "un número: cada vez la misma respuesta; vacía: una nueva"
    ),
    "a new one each time": "una nueva cada vez",
    "How it chooses its words": "Cómo elige sus palabras",
    "a prompt box: run this cell to use it": (
        "un cuadro para continuar textos: ejecuta esta celda para usarlo"
    ),
    "beginning": "comienzo",
    "Write": "Escribir",
    " (the model ends its text here)": " (el modelo termina aquí su texto)",
    "a chat: run this cell to talk": "una conversación: ejecuta esta celda para hablar",
    "hello": "¡Hola!",
    "Say something": "Di algo",
    "Say": "Enviar",
    "New conversation": "Nueva conversación",
    "two models: run this cell to ask them": "dos modelos: ejecuta esta celda para preguntarles",
    "nothing to compare: {error}": "nada que comparar: {error}",
    "the newest step": "el último paso",
    "Ask both": "Preguntar a los dos",
    "New": "Nueva",
    # exports, downloads, Drive: exports.py, drive.py
    "Web page": "Página web",
    "one page with the model inside, for any browser, also on a phone": (
        "una página con el modelo dentro, para cualquier navegador, también en el móvil"
    ),
    "GGUF": "GGUF",
    "for llama.cpp, ollama and LM Studio": "para llama.cpp, ollama y LM Studio",
    "transformers": "transformers",
    "a folder for Hugging Face transformers, as a .zip": (
        "una carpeta para transformers, de Hugging Face, como .zip"
    ),
    "Small file": "Archivo pequeño",
    "the smallest, for this program": "el más pequeño, para este programa",
    "buttons that export the model: run this cell to use them": (
        "botones que exportan el modelo: ejecuta esta celda para usarlos"
    ),
    "{name}: writing ...": "{name}: escribiendo ...",
    "an export": "un archivo exportado",
    "saved as {path}": "guardado como {path}",
    "Download {name}": "Descargar {name}",
    "or upload a model": "o sube un modelo",
    "{file}: now run everything again": "{file}: ahora ejecútalo todo de nuevo",
    "a button that uploads a model: run this cell to use it": (
        "un botón que sube un modelo: ejecuta esta celda para usarlo"
    ),
    "Drive: this is not Colab, so there is nothing to mount; runs stay in this folder": (
        "Drive: esto no es Colab y no hay nada que montar; todo se queda en esta carpeta"
    ),
    "Drive: not mounted ({error}). Training works without it, but the run is lost when Colab "
    "takes the machine back. To try again, run this cell once more and allow access within two "
    "minutes": (
        "Drive: no se ha montado ({error}). Se puede entrenar sin él, pero lo entrenado se pierde "
        "cuando Colab retira la máquina. Para intentarlo de nuevo, ejecuta otra vez esta celda y "
        "permite el acceso antes de dos minutos"
    ),
    "Drive: mounted; checkpoints are copied to MyDrive/bitllm": (
        "Drive: montado; los puntos de control se copian en MyDrive/bitllm"
    ),
    # the machine: setup.py
    "none, so the CPU trains. In Colab: Runtime > Change runtime type > T4 GPU": (
        "ninguna: entrena la CPU. En Colab: Entorno de ejecución > Cambiar tipo de entorno de "
        "ejecución > GPU T4"
    ),
    "unknown": "desconocida",
    "{memory}, {count} cores": "{memory}, {count} núcleos",
    "disk": "disco",
    "precision": "precisión",
    "available": "disponible",
    "versions": "versiones",
    "package": "paquete",
    "{free:.1f} of {total:.1f} GiB free": "{free:.1f} de {total:.1f} GiB libres",
    "\nThis notebook is a copy of one in {origin}. For the package of that repository, run\n"
    "{command}\nand restart the session.": (
        "\nEste cuaderno es copia de uno de {origin}. Para usar el paquete de ese repositorio, "
        "ejecuta\n{command}\ny reinicia la sesión."
    ),
}

MESSAGES = {
    # what the form's fields expect: form.py, settings.py and the core
    "a number": "un número",
    "a whole number": "un número entero",
    "a finite number": "un número finito",
    "at least {limit}": "{limit} o más",
    "at most {limit}": "{limit} o menos",
    "more than {limit}": "más de {limit}",
    "less than {limit}": "menos de {limit}",
    "0 (the preset's steps) or more": "0 (los pasos del preset) o más",
    "a multiple of max_position_embeddings={context}, such as {below} or {above}": (
        "un múltiplo del contexto, {context}, por ejemplo {below} o {above}"
    ),
    "a multiple of {head_dim}, such as {width}": "un múltiplo de {head_dim}, por ejemplo {width}",
    "a file or folder that is there, or a known name": (
        "un archivo o una carpeta que existan, o un nombre conocido"
    ),
    "companion:LANGUAGE, one of {languages}": "companion:IDIOMA, uno de {languages}",
    "a text of {count} characters or more; 100 kB or more make sense": (
        "un texto de {count} caracteres o más; mejor con 100 kB o más"
    ),
    # of the mirror, the compiler and the device
    "nothing copied yet": "aún no hay nada copiado",
    "step {step} is in {folder}": "el paso {step} está en {folder}",
    "no C++ compiler found": "falta un compilador de C++",
    "{device} (bfloat16 in hardware)": "{device} (bfloat16 por hardware)",
    "{device} (no bfloat16 in hardware; loss scaled)": (
        "{device} (sin bfloat16 por hardware; la pérdida se escala)"
    ),
    "{device} (no fast bfloat16 here)": "{device} (aquí no hay bfloat16 rápido)",
}
