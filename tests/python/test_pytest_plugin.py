"""The plugin, in a project of its own."""

from __future__ import annotations

import subprocess
import sys

# pytester forgets modules that a test was the first to import; numpy can't be imported again.
import gguf  # noqa: F401
import pytest
from batchcore.testing import synthetic_gguf

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester, tmp_path):
    model = synthetic_gguf(tmp_path / "model.gguf", n_layer=1, n_embd=64)
    pytester.makeini(
        f"""
        [pytest]
        batchcore_model = {model}
        batchcore_engine_options =
            max_num_seqs = 3
            n_ctx = 768
            prefix_caching = false
        """
    )
    return pytester


def run(project, *args):
    return project.runpytest_subprocess("-p", "no:cacheprovider", *args)


def test_engine_and_model(project):
    project.makepyfile(
        """
        def test_outputs(batchcore_engine, batchcore_model):
            assert batchcore_engine.model is batchcore_model
            assert batchcore_engine.max_num_seqs == 3
            assert batchcore_engine.n_ctx == 768
            assert batchcore_engine.generate([[5, 6]])[0].finished
        """
    )
    run(project).assert_outcomes(passed=1)


def test_another_model_on_the_command_line(project, tmp_path):
    other = synthetic_gguf(tmp_path / "other.gguf", "mamba2", n_layer=1, n_embd=64)
    project.makepyfile(
        """
        def test_model(batchcore_model):
            assert batchcore_model.memory_kind == "recurrent"
        """
    )
    run(project, "--batchcore-model", str(other)).assert_outcomes(passed=1)


def test_a_device_that_is_not_there_skips(project):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.batchcore_device("cpu")
        def test_here():
            pass

        @pytest.mark.batchcore_device("quantum")
        def test_elsewhere():
            raise AssertionError
        """
    )
    result = run(project, "-rs", "--strict-markers")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*needs the device 'quantum'*"])


def test_settings_that_are_none_are_refused(project):
    project.makeini("[pytest]\nbatchcore_engine_options = fast")
    project.makepyfile("def test_engine(batchcore_engine): pass")
    result = run(project, "--batchcore-model", "smollm2-135m")
    result.stdout.fnmatch_lines(["*'fast' is not NAME=VALUE*"])


def test_starting_pytest_does_not_import_batchcore(tmp_path):
    code = (
        "import sys, pytest; pytest.main(['--markers']); "
        "assert 'pytest_batchcore' in sys.modules; assert 'batchcore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
