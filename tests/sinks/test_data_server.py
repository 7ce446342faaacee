"""The event file as TensorBoard's own data server (its default loader) reads it."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gradwatch.protocols import RunMeta
from gradwatch.records import Histogram, Incident
from gradwatch.sinks import TensorBoardSink

from .made import INDEX, mixed_index, record

pytestmark = pytest.mark.slow

# A process of its own: the ingester leaves the server's pipe to the garbage collector.
READER = textwrap.dedent("""
    import json, sys, time
    from tensorboard import context
    from tensorboard.data.provider import RunTagFilter
    from tensorboard.data.server_ingester import SubprocessServerDataIngester, get_server_binary
    from tensorboard.util import grpc_util

    ingester = SubprocessServerDataIngester(
        server_binary=get_server_binary(), logdir=sys.argv[1], reload_interval=1,
        samples_per_plugin={"gradwatch": 5000},
        channel_creds_type=grpc_util.ChannelCredsType.LOCAL,
    )
    ingester.start()
    provider, said = ingester.data_provider, {}
    about = dict(ctx=context.RequestContext(), experiment_id="", plugin_name="gradwatch")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any("_incidents" in tag for tag in said):
        time.sleep(0.2)
        said = provider.list_tensors(**about).get("run", {})
    found = provider.read_tensors(**about, downsample=5000, run_tag_filter=RunTagFilter(runs=["run"]))["run"]
    values = lambda a: [v.decode() if isinstance(v, bytes) else repr(float(v)) for v in a.ravel().tolist()]
    print(json.dumps({
        tag: {"content": json.loads(said[tag].plugin_content),
              "points": [[p.step, list(p.numpy.shape), values(p.numpy)] for p in points]}
        for tag, points in found.items()
    }))
""")


def test_server_gives_every_series_whole(tmp_path):
    pytest.importorskip("tensorboard_data_server")
    with SummaryWriter(str(tmp_path / "run")) as writer:
        sink = TensorBoardSink(writer)
        sink.open(RunMeta(model="Net"))
        counts = {INDEX.paths[0]: Histogram(np.ones(512, np.int64))}
        values = np.array([np.nan, np.inf, 1e40, 0, 0])
        sink.write(record(3, columns={"grad_norm": values}), [record(2, histograms=counts)])
        # Both at one step, and not in one call: the server keeps the last point of a step alone.
        sink.incident(Incident(rule="dead", first_step=3, last_step=3, id=1))
        sink.flush()
        sink.incident(Incident(rule="exploding", first_step=3, last_step=3, id=2))
        sink.flush()
        other = mixed_index(4, 1)
        for step in range(4, 300):
            sink.write(record(step, other))
        sink.close()
    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    series = json.loads(done.stdout.splitlines()[-1])
    norms = {step: values for step, _, values in series["gradwatch/grad_norm"]["points"]}
    assert list(norms) == list(range(3, 300))
    assert norms[3] == ["nan", "inf", "1e+40"]
    assert len(norms[299]) == 4
    told = [[json.loads(text)["rule"] for text in texts] for _, _, texts in series["gradwatch/_incidents"]["points"]]
    assert told == [["dead", "exploding"]]
    indices = series["gradwatch/_index"]["points"]
    assert [(step, len(json.loads(text)["paths"])) for step, _, (text,) in indices] == [(2, 5), (4, 5)]
    assert [point[:2] for point in series["gradwatch/_histograms"]["points"]] == [[2, [1, 45]]]
    assert {s["content"]["schema"] for s in series.values()} == {1}
