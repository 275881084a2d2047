"""JupyterLab's configuration in `make lab`: what git knows of a notebook is refreshed when it is saved."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from keep_outputs import refresh


def after_save(model, os_path, contents_manager, **more):
    if model["type"] == "notebook":
        refresh(os_path)


get_config().FileContentsManager.post_save_hook = after_save  # noqa: F821
