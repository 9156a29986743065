"""A model repository: its configuration against the published schema and the graph, and sequences run as it says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from expecttest import assert_expected_inline
from google.protobuf import text_format

import bwcache_compile as bw
from bwcache_compile.bundle.settings import policy_inputs
from examples import triton_repository as triton
from tests.exporters.helpers import CONFIG, Exported, edit
from tests.models import noise


@pytest.fixture(scope="module")
def schema() -> Any:
    """The schema as NVIDIA publishes it, compiled (model_config.proto); the client around it would need grpc."""
    try:
        place = importlib.metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs tritonclient, which is in the extra [test]")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(place))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(schema: Any, folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


class Server:
    """What the configuration tells a server to do: controls, and one state for each sequence. It stands for no more of Triton."""

    def __init__(self, schema: Any, folder: Path) -> None:
        self.folder, self.config, self.schema = folder, parsed(schema, folder), schema
        self.session = ort.InferenceSession(str(folder / "1" / "model.onnx"))
        self.states: dict[int, dict[str, np.ndarray]] = {}

    def dtype(self, data_type: int) -> Any:
        name = self.schema.DataType.Name(data_type).removeprefix("TYPE_")
        return np.dtype({"FP32": "float32", "BOOL": "bool"}.get(name, name.lower()))

    def initial(self, state: Any) -> np.ndarray:
        (start,) = state.initial_state
        dtype = self.dtype(start.data_type)
        if start.WhichOneof("state_data") == "zero_data":
            return np.zeros(start.dims, dtype=dtype)
        return np.frombuffer((self.folder / "initial_state" / start.data_file).read_bytes(), dtype=dtype).reshape(start.dims)

    def infer(self, request: dict[str, np.ndarray], sequence: int, start: bool = False, end: bool = False) -> dict[str, np.ndarray]:
        batching = self.config.sequence_batching
        for entry in self.config.input:
            assert tuple(request[entry.name].shape) == tuple(entry.dims)
            assert request[entry.name].dtype == self.dtype(entry.data_type)
        if start:
            self.states[sequence] = {state.input_name: self.initial(state) for state in batching.state}
        known = {"CONTROL_SEQUENCE_START": start, "CONTROL_SEQUENCE_END": end}
        feeds = {**request, **self.states[sequence]}
        for entry in batching.control_input:
            (control,) = entry.control
            kind = self.schema.ModelSequenceBatching.Control.Kind.Name(control.kind)
            value = [control.bool_false_true[known[kind]]] if kind in known else [sequence]
            feeds[entry.name] = np.array(value, dtype=bool if kind in known else self.dtype(control.data_type))
        names = [value.name for value in self.session.get_outputs()]
        returned = dict(zip(names, self.session.run(None, feeds), strict=True))
        self.states[sequence] = {state.input_name: returned[state.output_name] for state in batching.state}
        return {entry.name: returned[entry.name] for entry in self.config.output}


@pytest.fixture(scope="module")
def folder(deployed: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return triton.write(deployed.folder, tmp_path_factory.mktemp("repository"), name="video", sizes={"x[1]": 40})


def test_the_configuration(folder: Path) -> None:
    text = (folder / "config.pbtxt").read_text()
    scalars = [entry for entry in text.split("input {\n") if '"policy.' in entry]
    assert len(scalars) == 6
    assert all("dims: [1]" in entry for entry in scalars)
    assert_expected_inline(
        text[text.index("output {") :],
        """\
output {
  name: "output"
  data_type: TYPE_FP32
  dims: [2, 40, 4]
}
output {
  name: "indicator"
  data_type: TYPE_FP32
  dims: [3]
}
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  direct {
  }
  control_input {
    name: "START"
    control {
      kind: CONTROL_SEQUENCE_START
      bool_false_true: [false, true]
    }
  }
  control_input {
    name: "END"
    control {
      kind: CONTROL_SEQUENCE_END
      bool_false_true: [false, true]
    }
  }
  control_input {
    name: "CORRID"
    control {
      kind: CONTROL_SEQUENCE_CORRID
      data_type: TYPE_UINT64
    }
  }
  state {
    input_name: "cache_in.output_0"
    output_name: "cache_out.output_0"
    data_type: TYPE_FP32
    dims: [2, 40, 32]
    initial_state {
      name: "output_0"
      data_type: TYPE_FP32
      dims: [2, 40, 32]
      zero_data: true
    }
  }
  state {
    input_name: "cache_in.reference_0"
    output_name: "cache_out.reference_0"
    data_type: TYPE_FP32
    dims: [2, 32]
    initial_state {
      name: "reference_0"
      data_type: TYPE_FP32
      dims: [2, 32]
      zero_data: true
    }
  }
  state {
    input_name: "cache_in.reference_1"
    output_name: "cache_out.reference_1"
    data_type: TYPE_FP32
    dims: [2, 32]
    initial_state {
      name: "reference_1"
      data_type: TYPE_FP32
      dims: [2, 32]
      zero_data: true
    }
  }
  state {
    input_name: "cache_in.reference_2"
    output_name: "cache_out.reference_2"
    data_type: TYPE_FP32
    dims: [2, 32]
    initial_state {
      name: "reference_2"
      data_type: TYPE_FP32
      dims: [2, 32]
      zero_data: true
    }
  }
  state {
    input_name: "cache_in.trigger"
    output_name: "cache_out.trigger"
    data_type: TYPE_INT64
    dims: [1]
    initial_state {
      name: "trigger"
      data_type: TYPE_INT64
      dims: [1]
      data_file: "trigger"
    }
  }
  state {
    input_name: "cache_in.reuse_until"
    output_name: "cache_out.reuse_until"
    data_type: TYPE_INT64
    dims: [1]
    initial_state {
      name: "reuse_until"
      data_type: TYPE_INT64
      dims: [1]
      data_file: "reuse_until"
    }
  }
}
""",
    )


def test_it_fits_the_schema_and_the_graph(schema: Any, folder: Path) -> None:
    server = Server(schema, folder)
    config, batching = server.config, server.config.sequence_batching
    assert (config.backend, config.max_batch_size, config.name) == ("onnxruntime", 0, "video")
    named = [*(e.name for e in config.input), *(s.input_name for s in batching.state), *(c.name for c in batching.control_input)]
    assert sorted(named) == sorted(value.name for value in server.session.get_inputs())
    returned = [*(e.name for e in config.output), *(s.output_name for s in batching.state)]
    assert sorted(returned) == sorted(value.name for value in server.session.get_outputs())
    with pytest.raises(text_format.ParseError):
        text_format.Parse((folder / "config.pbtxt").read_text().replace("zero_data", "zeros"), schema.ModelConfig())


def request(deployed: Exported, name: str, step: int) -> dict[str, np.ndarray]:
    values = list(CONFIG.policy_values(8).values())
    policy = {entry.name: (value, entry.dtype) for entry, value in zip(policy_inputs(CONFIG), values, strict=True)}
    scalars = {key: np.array([float(v) for v in value], dtype=dtype) for key, (value, dtype) in policy.items()}
    x, t = noise(name, step, 2, 40, 4).numpy(), np.full(2, 1 - step / 8, dtype=np.float32)
    return {"x": x, "t": t, **scalars, "step": np.array([step])}


def test_sequences_are_generations(schema: Any, deployed: Exported, folder: Path) -> None:
    """Two sequences in turn, then one of them again: as torch does it."""
    server = Server(schema, folder)
    for _ in range(2):
        deployed.cached.reset()
        patterns = {"xa": "", "xb": ""}
        for step in range(8):
            for sequence, name in enumerate(patterns, 1):
                returned = server.infer(request(deployed, name, step), sequence, start=step == 0, end=step == 7)
                with torch.no_grad(), deployed.cached.cache_context(name):
                    expected = deployed.cached(noise(name, step, 2, 40, 4), torch.full((2,), 1 - step / 8))
                np.testing.assert_allclose(returned["output"], expected.numpy(), rtol=1e-4, atol=1e-5)
                patterns[name] += "." if np.isnan(returned["indicator"]).all() else "#"
        assert patterns == {"xa": "##..#..#", "xb": "##..#..#"}


def test_a_started_sequence_computes_whatever_the_state_says(schema: Any, deployed: Exported, folder: Path) -> None:
    server = Server(schema, folder)
    server.infer(request(deployed, "x", 0), 1, start=True)
    for start in (False, True):
        server.states[1]["cache_in.reuse_until"] = np.array([5])
        server.initial = lambda state: server.states[1][state.input_name]  # type: ignore[method-assign]
        returned = server.infer(request(deployed, "x", 3), 1, start=start)
        assert np.isnan(returned["indicator"]).all() != start


def test_the_command_line_writes_the_same(
    deployed: Exported, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["triton_repository", str(deployed.folder), str(tmp_path), "--name", "video", "--size", "x[1]=40"]
    monkeypatch.setattr("sys.argv", words)
    triton.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "video")
    assert (tmp_path / "video" / "config.pbtxt").read_text() == (folder / "config.pbtxt").read_text()


def test_what_cannot_be_written(deployed: Exported, folder: Path, tmp_path: Path) -> None:
    messages = []
    reading = shutil.copytree(deployed.folder, tmp_path / "reading" / "bundle")
    edit(reading, lambda manifest: manifest["values"].append({"input": "t", "value": [1.0, 1.0]}))
    for bundle, settings in (
        (deployed.folder, {"directory": folder.parent, "name": "video"}),
        (deployed.folder, {"directory": tmp_path, "sizes": {"x[2]": 4}}),
        (deployed.folder, {"directory": tmp_path, "sizes": {"x[0]": 1}}),
        (reading, {"directory": tmp_path}),
    ):
        with pytest.raises(bw.ConfigError) as refusal:
            triton.write(bundle, **settings)  # type: ignore[arg-type]
        messages.append(str(refusal.value).replace(str(folder.parent), "REPOSITORY"))
    assert_expected_inline(
        "\n".join(messages),
        """\
REPOSITORY/video exists; it is not overwritten. Choose another name, or remove it.
unknown dynamic sizes: x[2]. This bundle has x[0], x[1].
smallest sizes: shape constraint violated: the graphs require x.shape[0] >= 2, got x.shape[0] = 1.
the values of t are built into the graphs, and a server compares none. Run the bundle by bw.load.""",
    )
    assert list(tmp_path.iterdir()) == [reading.parent]
