# The commands of README.md. Everything runs in .venv, which is made on first use.
SHELL   := bash -o pipefail
PYTHON  ?= python3
dataset ?= sample
studies ?= yardsticks methods knowledge_transfer
bin     := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help stage2 paper test lab notebooks lint sample

help:  ## list the targets
	@grep -E '^[a-z0-9]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet --editable '.[dev]'
	-git config filter.keep-outputs.clean "$(PYTHON) .ci/keep_outputs.py %f"
	touch $@

stage2: .venv/installed  ## both stages on dataset=<name or folder>, default sample; shows progress, prints the result
	@mkdir -p runs
	$(bin)/papermill nbs/05_stage2.ipynb "runs/stage2-$$(basename "$(dataset)").ipynb" -p dataset "$(dataset)" \
	  --stdout-file /dev/stdout --stderr-file /dev/stderr --no-progress-bar | cat

paper: .venv/installed  ## a report on dataset=<one or several>: studies=<names, or all>, base=<settings in JSON>; HTML and Markdown
	$(bin)/python -m ptmrec.report $(dataset) --studies $(studies) $(if $(base),--base "$$base")

test: .venv/installed lint  ## nbdev_test on every notebook, and pytest on tests/
	$(bin)/python -m pytest

lint: .venv/installed  ## ruff on package, notebooks and tests
	$(bin)/ruff check nbs ptmrec tests .ci

lab: .venv/installed  ## JupyterLab, on the page where to start
	$(bin)/jupyter lab nbs/index.ipynb --notebook-dir . --config .ci/jupyter_config.py

notebooks: .venv/installed  ## export, run, clean and stage all notebooks, so that stored outputs match the code
	$(bin)/nbdev_export
	$(bin)/python -m ptmrec.settings nbs/04_stage1.ipynb ptmrec.stage1.run_stage1 nbs/05_stage2.ipynb ptmrec.stage2.run_stage2
	TQDM_DISABLE=1 $(bin)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.store_widget_state=False \
	  --inplace nbs/*.ipynb
	$(bin)/nbdev_clean
	@mkdir -p nbs/images && cp "$$(ls -t runs/stage2/sample/*/results.png | head -n 1)" nbs/images/stage2_sample.png
	@cp runs/real_gains.png nbs/images/
	git -c filter.keep-outputs.clean= add --renormalize nbs

sample: .venv/installed  ## draw the sample and pretrain its CLIP and its CoCa again (about half an hour)
	$(bin)/python -m ptmrec.sample
