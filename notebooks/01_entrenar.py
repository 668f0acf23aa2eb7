# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: all,-language_info
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Entrena tu propio modelo de lenguaje de 1,58 bits
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bitllm/blob/main/notebooks/01_entrenar.ipynb)
#
# Al final tendrás tu propio modelo de lenguaje, entrenado desde cero: un compañero que habla
# español, con 2,2 millones de parámetros, para conversar con él, descargarlo y enviarlo a un amigo
# como página web. Sus pesos son solo -1, 0 y 1 ([BitNet b1.58](https://arxiv.org/abs/2402.17764)).
#
# ![Lo que verás: el progreso, lo que dice el modelo y su curva](attachment:live_display_es.png)
#
# **Ejecútalo todo una vez:** en Colab, *Entorno de ejecución > Ejecutar todas*; en JupyterLab,
# *Run > Run All Cells*. No hace falta pulsar nada más. Sin GPU tarda unos tres minutos. JupyterLab
# salta al final de la página: sube hasta **Entrenar** para mirar.
#
# Puedes pararlo cuando quieras: si lo ejecutas todo de nuevo, continúa donde lo dejaste. Solo los
# mensajes del registro están en inglés.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Preparar
import importlib.util
import os
import re
import subprocess
import sys

sys.path[:0] = [".", ".."]  # in a checkout the package is beside this notebook or above it
if not getattr(importlib.util.find_spec("bitllm"), "origin", None):  # elsewhere: install it
    sessions = subprocess.getoutput("curl -sm 2 $COLAB_JUPYTER_IP:$KMP_TARGET_PORT/api/sessions")
    match = re.search(r'github\.com/([^"]+?/blob/[^"]+?)/notebooks/', sessions.replace("%2F", "/"))
    source = os.environ.get("BITLLM_REPOSITORY") or (match[1] if match else "OWNER/bitllm@main")
    archive = f"https://github.com/{re.sub('/blob/|@', '/archive/', source)}.zip"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "jupyter_ui_poll"]
    subprocess.run([*pip, archive], check=True)  # if this fails: open bitllm_one_cell.ipynb

# %% cellView="form" jupyter={"source_hidden": true}
# @title Empezar
import bitllm as bit

bit.speak("es")
bit.log_to(sys.stdout)
bit.brief_errors()
bit.show_environment()

# %% [markdown]
# ## Elegir
#
# Para un primer modelo, déjalo todo como está. O inventa tu compañero (nombre, casa, gustos), o
# pega un texto tuyo en *tu propio texto*, y pulsa **Entrenar**; o ejecútalo todo de nuevo: lo que
# has escrito se conserva. Con `wikipedia-es` en *texto que aprende*, aprende de la Wikipedia.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Ajustes
panel = bit.SettingsPanel.kept(bit.Settings(data="companion:es"))
panel.show()

# %% [markdown]
# Colab borra su máquina, con todos los archivos, al cabo de unas horas. Marca esta casilla para
# copiar cada punto de control a tu Google Drive; mañana este cuaderno continúa desde ahí.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Google Drive (opcional)
use_drive = False  # @param {type: "boolean"}
drive = bit.mount_drive() if use_drive else None

# %% [markdown]
# ## Entrenar
#
# La pérdida (*loss* en el registro) es cuánto sorprende al modelo cada trozo de texto: cuanto más
# baja, mejor. Lo que dice pasa del ruido a las frases.

# %%
settings = panel.settings
run = settings.run_folder
if drive and not settings.mirror:
    settings = settings.replace(mirror=str(drive / run.name))
display = bit.LiveDisplay(run)
state = bit.train(*settings.configs(), run, callbacks=[display], **settings.options)
display.show_end(state)

# %% [markdown]
# ## Hablar con él
#
# Ya ha respondido una vez. Ahora tú: escribe y pulsa **Enviar**. Un modelo que no ha aprendido de
# conversaciones continúa, en cambio, el comienzo de un texto. Uno tan pequeño ha aprendido cómo es
# su texto, no lo que significa: ayudan más pasos, más texto y más anchura, en este orden.

# %%
bit.try_out(run)

# %% [markdown]
# ## Guardarlo
#
# Para conservar el modelo, guarda su carpeta. O expórtalo: la página web se abre en cualquier
# navegador, también en el móvil, y no necesita conexión. La primera página descarga llama.cpp para
# navegadores (17 MB).

# %%
bit.export_box(run)

# %% [markdown]
# <details><summary>Palabras</summary>
#
# - **Token**: un trozo de texto, de una letra a una palabra.
# - **Paso** (*step*): el modelo lee un poco de texto y después cada peso se mueve un poco.
# - **Pérdida** (*loss*): la sorpresa por token, en nats.
# - **Perplejidad**: entre cuántos tokens duda.
# - **Validación**: lo mismo, con texto del que nunca aprende.
# - **Época**: una vez todo el texto.
# - **Peso ternario**: -1, 0 o 1; elegir entre tres cuesta 1,58 bits.
#
# </details>
#
# Sigue en [02_use](https://github.com/OWNER/bitllm/blob/main/notebooks/02_use.ipynb) (en inglés).
# La guía: [README.es](https://github.com/OWNER/bitllm/blob/main/README.es.md).

# %% cellView="form" jupyter={"source_hidden": true}
# @title Comprobar esta GPU: marca la casilla y ejecuta esta celda (10 minutos)
check_this_gpu = False  # @param {type: "boolean"}
if check_this_gpu:
    bit.check_gpu()  # its results.jsonl is what docs/gpu.md asks for
