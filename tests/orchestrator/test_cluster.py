"""The shipped cluster files: valid for Ray, with tokens, tags and the four kinds of node."""

import shlex
from pathlib import Path

import pytest
import yaml

from orchestrator.cluster import ClusterFileError, load_cluster
from orchestrator.planning import local_messages, planned_cells, read_sweep

ROOT = Path(__file__).parents[2]
ON_PREMISE = ROOT / "cluster.yaml"
CLOUD = ROOT / "docs" / "cluster-cloud.yaml"
RAYJOB = ROOT / "docs" / "rayjob.yaml"
GIB = 2**30


def load(path):
    return yaml.safe_load(path.read_text())


def as_ray_does(config):
    """What `ray up` does to a file before it touches a machine."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("path", [ON_PREMISE, CLOUD], ids=lambda path: path.name)
def test_ray_accepts_the_file(path):
    prepared = as_ray_does(load(path))
    assert prepared["available_node_types"]
    with pytest.raises(Exception, match="additional_key"):
        as_ray_does({**load(path), "additional_key": 1})


def test_ray_sees_every_host_of_the_on_premise_file():
    prepared = as_ray_does(load(ON_PREMISE))
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == 4


@pytest.mark.parametrize("path", [ON_PREMISE, CLOUD], ids=lambda path: path.name)
def test_every_start_has_a_token_and_normal_priority(path):
    config = load(path)
    starts = [
        command
        for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert {"RAY_AUTH_MODE=token", "RAY_worker_niceness=0;"} <= set(shlex.split(command))
        assert "RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in command
        assert "0.0.0.0" not in command
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("pip install -c constraints.txt '.[cluster]'" in command for command in config["setup_commands"])
    assert (ROOT / "constraints.txt").exists()


def test_an_on_premise_host_finds_its_own_tag():
    start = load(ON_PREMISE)["worker_start_ray_commands"][-1]
    assert "--labels bench/hw=$(~/.benchmatrix/bin/benchmatrix tag)" in start


def test_the_on_premise_metadata_names_exactly_the_workers():
    config = load(ON_PREMISE)
    nodes = config["metadata"]["benchmatrix"]["nodes"].values()
    addresses = [address for node in nodes for address in node["addresses"]]
    assert sorted(addresses) == sorted(config["provider"]["worker_ips"])


def test_node_classes_of_the_on_premise_file():
    classes = {node.tag: node for node in load_cluster(ON_PREMISE)}
    assert {tag: (node.kind, node.memory_bytes // GIB) for tag, node in classes.items()} == {
        "a100-80gb": ("cuda", 80),
        "rtx3090": ("cuda", 24),
        "rtx4060": ("cuda", 8),
        "cpu": ("cpu", 64),
    }
    device = classes["rtx3090"].device()
    assert (device.tag, device.compute_capability) == ("rtx3090", (8, 6))


def test_node_classes_of_the_cloud_file_are_what_aws_really_has():
    classes = {node.name: node for node in load_cluster(CLOUD)}
    assert {name: node.tag for name, node in classes.items()} == {
        "a100": "a100-40gb",
        "rtx3090": "a10g",
        "rtx4060": "l4",
        "cpu": "cpu",
    }
    assert classes["a100"].accelerators == 8
    assert classes["cpu"].kind == "cpu"


def test_the_rayjob_has_the_shape_that_kuberay_reads():
    job = load(RAYJOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["backoffLimit"] == 0
    assert shlex.split(spec["entrypoint"])[:2] == ["benchmatrix", "run"]
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == "2.60.0"
    assert cluster["authOptions"] == {"mode": "token"}
    workers = cluster["workerGroupSpecs"]
    arguments = shlex.split(spec["entrypoint"])
    sweep = read_sweep(arguments[2], [arguments[arguments.index("--set") + 1]])
    assert sweep.hardware == [group["labels"]["bench/hw"] for group in workers]
    assert [group["labels"]["bench/hw"] for group in workers] == ["a100-80gb", "rtx3090", "rtx4060", "cpu"]
    for group in [cluster["headGroupSpec"], *workers]:
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert all(isinstance(value, str) for value in group["labels"].values())
        assert "labels" not in group["rayStartParams"]  # KubeRay refuses them beside the group's own
    for group in workers:
        (container,) = group["template"]["spec"]["containers"]
        wanted = "1" if group["groupName"] != "cpu" else None
        assert container["resources"]["limits"].get("nvidia.com/gpu") == wanted
        assert ("nodeSelector" in group["template"]["spec"]) == (wanted is not None)


@pytest.mark.parametrize(
    ("hardware", "tags", "unused"),
    [
        ("local", ["head", "cpu", "rtx3090", "a100-80gb"], "a100-80gb,rtx3090"),
        ("local", ["head", "cpu"], None),
        ("local,a100,rtx3090", ["cpu", "rtx3090", "a100-80gb"], None),
        ("cpu", ["cpu", "rtx3090"], None),
    ],
)
def test_what_local_leaves_unused_on_a_cluster_is_said(hardware, tags, unused):
    messages = local_messages(planned_cells(read_sweep("llama-1b", [f"hardware=[{hardware}]"]), None, "cpu"), tags)
    assert [message.partition("--set ")[2] for message in messages] == ([f"'hardware=[{unused}]'"] if unused else [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("[]", "does not describe node classes"),
        ("provider: {type: local}", "names no nodes"),
        ("available_node_types: {x: {resources: {GPU: 1}}}", "x has no bench/hw"),
        ("available_node_types: {x: {labels: {bench/hw: l4}}}", "x has no bench/memory-gib"),
        ("metadata: {benchmatrix: {nodes: {x: {tag: l4, memory_gib: 24, kind: gpu}}}}", "kind is 'gpu'"),
        (
            "metadata: {benchmatrix: {nodes: {x: {tag: l4, memory_gib: 24, kind: cuda, compute_capability: 8}}}}",
            "compute capability 8 is not like 8.6",
        ),
    ],
)
def test_a_bad_file_ends_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ClusterFileError, match=message) as caught:
        load_cluster(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_ends_in_one_sentence(tmp_path):
    with pytest.raises(ClusterFileError, match="No such file"):
        load_cluster(tmp_path / "none.yaml")
