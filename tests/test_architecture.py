# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules of the codebase that a machine can check: import directions, sizes, headers, packaging, and no unread config field."""

import ast
import configparser
import dataclasses
import functools
import itertools
import re
import typing
from pathlib import Path

import pytest

from mesh_transformer.config import Config

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "mesh_transformer").rglob("*.py"))
PROGRAMS = sorted([*ROOT.glob("device_*.py"), *(ROOT / "scripts").rglob("*.py")])
SOURCES = PACKAGE + PROGRAMS
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


every_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)

# Packages from the bottom up: a module imports from its own package and from the packages in its row. There are no
# exceptions; a new edge belongs here only if it makes no cycle (test_the_map_has_no_cycle).
BASE = {"cli", "config", "distributed", "host_memory", "mesh", "storage"}
MAY_IMPORT = {
    "config": set(),
    "host_memory": set(),
    "cli": {"config"},
    "storage": {"config"},
    "distributed": {"cli", "config", "storage"},
    "mesh": {"config", "host_memory"},
    "data": {"cli", "config", "host_memory", "storage"},
    "model": {"config", "mesh"},
    "checkpoint": BASE | {"model"},
    "reports": {"config", "distributed", "storage"},
    "corpus": {"cli", "config", "data", "host_memory", "reports", "storage"},
    "convert": BASE | {"checkpoint", "data", "model"},
    "train": BASE | {"checkpoint", "convert", "data", "model", "reports"},
    "sample": BASE | {"checkpoint", "convert", "data", "model", "reports", "train"},
    "serve": BASE | {"data", "sample"},
    "evaluate": BASE | {"checkpoint", "data", "model", "reports", "sample", "train"},
    "plan": BASE | {"data", "model", "reports", "sample", "train"},
    "library": BASE | {"convert", "data", "evaluate", "sample", "train"},
    "__main__": {"cli"},
}
CONFIG_LEAVES = {
    "evaluation",
    "field_types",
    "model",
    "moe",
    "presets",
    "presets_dense",
    "presets_experts",
    "renamed",
    "rope",
}  # of config/: import no other package


@functools.cache
def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, relative to the package."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            if node.module == "mesh_transformer":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("mesh_transformer."):
                module = node.module.removeprefix("mesh_transformer.")
                found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("mesh_transformer.")
                for alias in node.names
                if alias.name.startswith("mesh_transformer.")
            }
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_down(path):
    package = path.relative_to(ROOT / "mesh_transformer").with_suffix("").parts[0]
    if package == "__init__":
        assert {other.split(".")[0] for other in imported(path)} <= {"config", "library"}, "lazily, for type checkers"
        return
    assert package in MAY_IMPORT, f"{name_of(path)}: give the package {package!r} a row in MAY_IMPORT"
    for other in imported(path) - {"__version__"}:
        assert other.split(".")[0] in MAY_IMPORT[package] | {package}, f"{name_of(path)} imports {other}"


def test_the_map_has_no_cycle():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [name for name, below in MAY_IMPORT.items() if name not in order and below <= set(order)]
        assert free, f"a cycle among {sorted(set(MAY_IMPORT) - set(order))}"
        order += free


def test_data_does_not_import_jax_models():
    """Data is prepared on machines without accelerators, where Haiku and optax need not be installed."""
    for path in (ROOT / "mesh_transformer" / "data").rglob("*.py"):
        modules = [
            n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
            for n in ast.walk(parse(path))
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        assert not any((module or "").split(".")[0] in ("haiku", "optax") for module in modules), name_of(path)


def test_no_drawers():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "base", "core", "lib", "stuff"}
    assert [name_of(p) for p in SOURCES if drawers & set(p.stem.replace("out_of_core", "").split("_"))] == []


@every_source
def test_header_docstring_and_length(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(
        "# SPDX-FileCopyrightText: Mesh Transformer contributors\n# SPDX-License-Identifier: Apache-2.0\n"
    ) or (text.startswith("#!") and "# SPDX-License-Identifier: Apache-2.0\n" in text[:200])
    assert ast.get_docstring(parse(path)), "no docstring"
    assert len(text.splitlines()) <= 500


@every_source
def test_functions_are_short(path):
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in functions
        if (node.end_lineno or 0) - node.lineno >= 100
    }
    assert not long


# A subclass of Unpickler that rejects all but tensors; the safe loader, for GPT-NeoX's configurations.
ALLOWED = {"convert/huggingface/tensor_files.py": {"pickle"}, "scripts/import_config.py": {"yaml"}}


@every_source
def test_no_traps(path):
    """No bare except, no pickle, no evaluation of text, no YAML, no stub, no TODO."""
    allowed = next((names for end, names in ALLOWED.items() if name_of(path).endswith(end)), set())
    for node in ast.walk(parse(path)):
        place = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{place}: bare except"
            assert (
                not all(isinstance(inner, ast.Pass) for inner in node.body) or ast.unparse(node.type) != "Exception"
            ), place
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            trapped = {"pickle", "cPickle", "dill", "marshal", "shelve", "yaml"} - allowed
            assert not trapped & {module.split(".")[0] for module in modules}, place
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {
                "eval",
                "exec",
                "compile",
                "__import__",
                "yaml.load",
                "pickle.load",
                "pickle.loads",
                "os.system",
            }, place
            for keyword in node.keywords:
                trap = {"allow_pickle", "shell", "trust_remote_code"}
                assert not (keyword.arg in trap and ast.unparse(keyword.value) == "True"), (
                    f"{place}: {keyword.arg}=True"
                )
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8"))


def test_few_suppressions():
    pattern = re.compile(r"#\s*(type|pyright):\s*ignore")
    found = [
        f"{name_of(path)}:{i}"
        for path in SOURCES
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert len(found) <= 10, found


def sections(kind=Config, name: str = "") -> dict[str, type]:
    """Every section of the schema by the name of its field, sections in dictionaries and nested ones included."""
    found = {name: kind} if name else {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found |= sections(inner, field.name)
    return found


def attribute_chains(paths: list[Path]) -> set[tuple[str, ...]]:
    """Names of attributes that are read one after another: `config.model.n_layers` gives ("config", "model", "n_layers")."""
    found = set()
    for path in paths:
        for node in ast.walk(parse(path)):
            chain: list[str] = []
            inner: ast.AST = node
            while isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load):
                chain.insert(0, inner.attr)
                inner = inner.value
            if chain and isinstance(inner, ast.Name):
                found.add((inner.id, *chain))
    return found


# Names that functions give to a section which they receive; the section's own name always counts.
SECTION_NAMES = {
    "model": {"c", "config"},
    "rope_scaling": {"scaling"},
    "experts": {"e"},
    "mesh": {"config"},
    "optimizer": {"config"},
    "sample": {"options"},
    "serve": {"limits"},
    "train": {"source"},  # a dataset of data.train
    "validation": {"source"},
}
# Fields that the schema's own properties and methods turn into something else, which is read instead.
READ_THROUGH = {
    "d_head": "head_dim",
    "n_kv_heads": "kv_heads",
    "d_ff": "ff_dim",
    "rope_dims": "rope_dim",
    "rope_pattern": "pattern",
    "attention_factor": "rotation_scale",
    "mscale": "rotation_scale",
    "mscale_all_dim": "rotation_scale",
    "preset": "load_config",  # while loading
    "noise_density": "measure_spans",
    "mean_noise_span_length": "measure_spans",
}


def test_every_config_field_is_read():
    """Outside config/, as an attribute of its section."""
    chains = attribute_chains([path for path in SOURCES if "config" not in path.relative_to(ROOT).parts])
    names = {name for path in SOURCES for node in ast.walk(parse(path)) for name in [getattr(node, "id", "")]}
    unread = []
    for section, kind in sections().items():
        owners = {section} | SECTION_NAMES.get(section, set())
        read = {name for chain in chains for owner, name in itertools.pairwise(chain) if owner in owners}
        for field in dataclasses.fields(kind):
            if READ_THROUGH.get(field.name, field.name) not in read | names:
                unread.append(f"{section}.{field.name}")
    assert {"experts", "rope_scaling", "optimizer", "train"} <= sections().keys()
    assert unread == []


def test_an_unread_field_is_found():
    chains = attribute_chains([ROOT / "mesh_transformer" / "train" / "optimizer.py"])
    assert ("config", "weight_decay") in chains
    assert not any("max_minutes" in chain for chain in chains)


def test_setup_lists_every_package():
    """The wheel holds what setup.cfg lists, so every folder with modules, configurations or scripts must be there."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    package = {".".join(path.relative_to(ROOT).parent.parts) for path in PACKAGE}
    for folder, kind in (("configs", "toml"), ("scripts", "py")):
        package |= {
            f"mesh_transformer.{'.'.join(p.relative_to(ROOT).parent.parts)}" for p in (ROOT / folder).rglob(f"*.{kind}")
        }
    assert listed == package
    assert set(config["options"]["py_modules"].split()) == {path.stem for path in ROOT.glob("device_*.py")}
    for path in (ROOT / "mesh_transformer").rglob("*"):
        if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.py")):
            assert (path / "__init__.py").is_file(), f"{path.relative_to(ROOT)} is not a package"
    data = config["options.package_data"]
    for path in (ROOT / "mesh_transformer").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            patterns = data.get(".".join(path.relative_to(ROOT).parent.parts), "").split(", ")
            assert any(path.match(pattern) for pattern in patterns if pattern), (
                f"package_data lacks {path.relative_to(ROOT)}"
            )


# Modules without a test file of their own, by the file that tests them.
COVERED_BY = {
    "convert/huggingface/quantized/test_formats.py": (
        "convert.huggingface.quantized.bitsandbytes",
        "convert.huggingface.quantized.compressed_tensors",
        "convert.huggingface.quantized.decoding",
        "convert.huggingface.quantized.mxfp4",
        "convert.huggingface.quantized.packed",
        "convert.huggingface.quantized.scaled",
    ),
    "checkpoint/test_object_store_backend.py": ("convert.upload", "data.download"),
    "checkpoint/test_store.py": ("checkpoint.backends", "checkpoint.commit", "storage.digests"),
    "config/test_loading.py": (
        "config.evaluation",
        "config.latent_attention",
        "config.layers",
        "config.model",
        "config.moe",
        "config.schema",
    ),
    "model/test_positions.py": ("config.rope",),
    "config/test_presets.py": (
        "config.presets_experts",
        "model.shapes",
    ),
    "config/test_resume_rules.py": ("config.field_types",),
    "convert/gptj/test_reader.py": ("convert.gptj.reference", "convert.gptj.writer"),
    "convert/huggingface/test_bert.py": ("convert.huggingface.albert", "convert.huggingface.roberta"),
    "convert/huggingface/test_families.py": (
        "convert.huggingface.bloom",
        "convert.huggingface.falcon",
        "convert.huggingface.gpt_bigcode",
        "convert.huggingface.mpt",
        "convert.huggingface.opt",
    ),
    "convert/gguf/test_tokenizer.py": ("convert.gguf.pre_tokenizers", "convert.gguf.tokenizer_writer"),
    "convert/huggingface/test_reader.py": (
        "convert.huggingface.config_map",
        "convert.huggingface.tensor_files",
        "convert.huggingface.tensor_map",
    ),
    "convert/huggingface/test_qwen_moe.py": ("convert.huggingface.deepseek", "convert.huggingface.gpt_oss"),
    "convert/huggingface/test_reference.py": (
        "convert.huggingface.config_map_t5",
        "convert.huggingface.gemma2",
        "convert.huggingface.reference_t5",
    ),
    "convert/test_conversion.py": (
        "convert.bit_check",
        "convert.destination",
        "convert.library_logits",
        "convert.logit_check",
        "convert.progress",
        "convert.readers",
    ),
    "convert/test_writers.py": ("convert.import_plan", "convert.slicing"),
    "corpus/test_build_corpus.py": (
        "corpus.build",
        "corpus.datasheet.content",
        "corpus.datasheet.html",
        "corpus.datasheet.page",
        "corpus.datasheet.questions",
        "corpus.datasheet.survey",
        "corpus.parts",
        "corpus.stage_filter",
        "corpus.stage_mix",
        "corpus.stage_select",
    ),
    "corpus/test_filters.py": ("corpus.contamination", "corpus.quality", "corpus.word_tokenizer"),
    "corpus/test_slurm.py": ("corpus.executors",),
    "corpus/test_sources.py": ("corpus.latex", "corpus.markup"),
    "corpus/test_version_1_0.py": ("corpus.renamed",),
    "data/test_loader.py": ("data.errors",),
    "data/test_readers.py": ("data.compression", "data.formats"),
    "data/test_shard_builder.py": ("data.dataset",),
    "data/test_tokenizers.py": (
        "data.file_tokenizer",
        "data.stream_decoder",
        "data.token_bytes",
        "data.tokenizer_files",
        "data.vocabularies",
        "data.vocabulary_files",
    ),
    "distributed/test_bootstrap.py": ("distributed.watchdog",),
    "evaluate/test_evaluation.py": (
        "evaluate.callback",
        "evaluate.checkpoint_eval",
        "evaluate.published",
        "evaluate.synthetic_tasks",
        "evaluate.tasks",
        "evaluate.texts",
        "reports.evaluation_results",
    ),
    "evaluate/test_harness_model.py": ("evaluate.harness_tasks", "evaluate.superglue"),
    "evaluate/test_perplexity.py": ("evaluate.wikitext",),
    "model/attention/test_kernels.py": ("model.attention.masks",),
    "model/moe/test_layer.py": ("model.moe.dispatch",),
    "model/test_formulas.py": ("model.lm_head",),
    "model/test_quantization.py": ("model.linear",),
    "model/test_transformer.py": (
        "model.attention.dense",
        "model.attention.kv_cache",
        "model.attention.layer",
        "model.embedding",
        "model.feed_forward",
        "model.params",
    ),
    "plan/hardware/test_topologies.py": ("plan.hardware.chips", "plan.run"),
    "plan/hlo/test_collectives.py": ("plan.hlo.parser", "plan.hlo.traffic"),
    "plan/test_compile_worker.py": ("plan.compile_jobs", "plan.fit", "plan.job", "plan.report", "plan.suggestions"),
    "plan/test_search.py": ("plan.roofline", "plan.search_plot"),
    "reports/test_html_report.py": ("reports.expert_load", "reports.page"),
    "sample/engine/test_decoder_only.py": (
        "sample.engine.buckets",
        "sample.engine.decode_batch",
        "sample.engine.device_state",
        "sample.engine.engine",
        "sample.engine.generation",
        "sample.engine.prefill",
        "sample.engine.prefix_cache",
        "sample.engine.programs",
        "sample.engine.requests",
    ),
    "sample/engine/test_encoder_decoder.py": ("sample.engine.encoder_decoder_programs",),
    "sample/test_memory.py": ("host_memory",),
    "serve/test_server.py": (
        "serve.app",
        "serve.chat_completions",
        "serve.completions",
        "serve.engine_thread",
        "serve.metrics",
        "serve.protocol",
    ),
    "storage/test_direct_io.py": ("storage.positioned_file",),
    "storage/test_paths.py": ("storage.errors",),
    "test_journey.py": ("sample.training_samples",),
    "test_library.py": ("train.session",),
    "train/test_loop.py": ("train.data_log", "train.recorder", "train.run", "train.run_folder", "train.validation"),
    "train/test_replay.py": ("train.provenance",),
    "train/test_pipeline.py": ("train.compile",),
    "train/test_step.py": ("train.state",),
}
# Test files of programs, formats and whole behaviors, which belong to no single module.
WHOLE = {
    "checkpoint/test_object_stores.py", "checkpoint/test_program.py", "convert/gguf/test_llama_cpp_files.py",
    "convert/gguf/test_real_model.py", "corpus/test_bench_corpus.py",
    "corpus/test_build_corpus.py", "corpus/test_inspect_corpus.py", "corpus/test_ray.py", "corpus/test_slurm.py",
    "corpus/test_version_1_0.py", "distributed/test_processes.py", "model/test_encoder.py", "model/test_reference.py",
    "sample/test_memory.py", "scripts/test_bench.py", "serve/test_chat_server.py", "serve/test_converted_server.py",
    "test_architecture.py",
    "test_docs_commands.py", "test_journey.py", "test_notebooks.py", "test_troubleshooting.py", "test_version_1_0.py",
    "test_vocabulary.py",
}  # fmt: skip


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted path below it."""
    root = ROOT / "mesh_transformer"
    named = {".".join(path.relative_to(root).with_suffix("").parts): path for path in PACKAGE}
    return {name: path for name, path in named.items() if not name.endswith(("__init__", "__main__"))}


def named_in(path: Path) -> list[Path]:
    """Programs and test helpers that a test file names, as processes to start or modules to import."""
    text = path.read_text(encoding="utf-8")
    named = [other for other in [*PROGRAMS, *TESTS] if re.search(rf"\b{other.stem}\b", text) and other != path]
    return [*named, modules()["library"]] if re.search(r"\bmt\.", text) else named


def reached_from(path: Path) -> set[str]:
    """Modules that a test file imports, directly or not, with those of the programs and test helpers that it names."""
    known = modules()
    seen: set[str] = set()
    named = named_in(path)
    waiting = [path, *named, *(other for helper in named if helper in TESTS for other in named_in(helper))]
    while waiting:
        for name in imported(waiting.pop()):
            name = "config.loading" if name == "config" else name
            if name in known and name not in seen:
                seen.add(name)
                waiting.append(known[name])
    return seen


def test_tests_mirror_the_tree():
    """A module is tested in tests/<package>/test_<module>.py, or in the file that COVERED_BY names, which reaches it."""
    files = {path.relative_to(ROOT / "tests").as_posix(): path for path in TESTS if path.name.startswith("test_")}
    own = {name: "/".join([*name.split(".")[:-1], f"test_{name.split('.')[-1]}.py"]) for name in modules()}
    covered = {name: file for file, names in COVERED_BY.items() for name in names}
    assert {name for name, file in own.items() if file not in files} == set(covered), "update COVERED_BY"
    for file, names in COVERED_BY.items():
        assert set(names) <= reached_from(files[file]), (
            f"{file} does not reach {set(names) - reached_from(files[file])}"
        )
    programs = {
        f"{path.relative_to(ROOT).parent.as_posix()}/test_{path.stem}.py".removeprefix("./") for path in PROGRAMS
    }
    assert set(files) - set(own.values()) - programs == WHOLE, "update WHOLE"


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_test_files_have_a_header_and_no_local_paths(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-FileCopyrightText")
    assert not re.search(r"(?<![\w}*])/(work|tmp)/[a-z]", text), "names a path of one machine"
