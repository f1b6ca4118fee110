"""What the overlays say, against the schemas of Kubernetes and KubeRay and against the project itself. No cluster."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import OVERLAYS, ROOT, objects, render, walk
from typer.main import get_command

from pipeline.spec import load_batch, load_retraining
from ray_jobs.cli import app

KUBERNETES = "1.34"
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGE = f"polyconcept:{PROJECT['project']['version']}-ray{PINNED['ray']}"

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def kuberay_schema(kind: str) -> dict[str, Any]:
    """A custom resource's schema; what it does not know is an error, where Kubernetes would drop it."""
    schema = json.loads((ROOT / "tests" / "data" / "kuberay" / f"{kind}.json").read_text())
    for node in walk(schema):
        if isinstance(node.get("properties"), dict) and "type" in node and node is not schema["properties"]["metadata"]:
            node.setdefault("additionalProperties", bool(node.get("x-kubernetes-preserve-unknown-fields")))
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def pods(overlay: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, spec) of every pod that an overlay asks for."""
    return [(f"{o['kind']} {o['metadata']}", n) for o in objects(overlay) for n in walk(o) if "containers" in n]


@overlays
def test_objects_follow_their_schemas(overlay):
    kinds = set()
    for item in objects(overlay):
        kinds.add(item["kind"])
        if item["apiVersion"] == "ray.io/v1":
            jsonschema.Draft202012Validator(kuberay_schema(item["kind"])).validate(item)
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    assert {"RayCluster", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"} <= kinds
    for _, pod in pods(overlay):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod}, KUBERNETES, strict=True
        )


@pytest.mark.parametrize("store", ["store", "store-dev"])
def test_what_lasts_is_in_no_overlay(store):
    """`kubectl delete -k` of an overlay takes neither the namespace, with its secrets, nor the volume."""
    lasting = render(store)
    for item in lasting:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    assert {o["kind"] for o in lasting} == {"Namespace", "PersistentVolumeClaim"}
    for item in (o for overlay in OVERLAYS for o in render(f"overlays/{overlay}")):
        assert item["kind"] not in ("Namespace", "PersistentVolume", "PersistentVolumeClaim", "StorageClass", "Secret")
        assert item["metadata"]["namespace"] == lasting[0]["metadata"]["name"]
    claims = {n["claimName"] for o in objects("cron") for n in walk(o) if "claimName" in n}
    assert claims == {o["metadata"]["name"] for o in lasting if o["kind"] == "PersistentVolumeClaim"}


def test_schemas_refuse_what_they_do_not_know():
    item = next(o for o in objects("cron") if o["kind"] == "RayCronJob")
    for path in ([], ["jobTemplate"], ["jobTemplate", "rayClusterSpec", "headGroupSpec", "template", "spec"]):
        broken = json.loads(json.dumps(item))
        node = broken["spec"]
        for key in path:
            node = node[key]
        node["concurencyPolicy"] = "Forbid"
        with pytest.raises(jsonschema.ValidationError, match="concurencyPolicy"):
            jsonschema.Draft202012Validator(kuberay_schema("RayCronJob")).validate(broken)


@overlays
def test_pods_may_do_little(overlay):
    found = pods(overlay)
    assert len(found) >= 2
    for where, pod in found:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"], where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), where
        assert not any("hostPath" in volume for volume in pod["volumes"]), where
        names = [container["name"] for container in pod["containers"]]
        assert pod.get("automountServiceAccountToken", True) == (names == ["create"]), (where, names)
        # one that is there: a head's, left out, would be made by KubeRay, and others' be `default`
        accounts = {o["metadata"]["name"] for o in objects(overlay) if o["kind"] == "ServiceAccount"}
        assert pod["serviceAccountName"] in accounts - ({"retrain"} if names != ["create"] else {"ray"}), where
    confined = [c for _, pod in found for c in pod["containers"]]
    confined += [n["autoscalerOptions"] for o in objects(overlay) for n in walk(o) if "autoscalerOptions" in n]
    for container in confined:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for bound in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][bound])
        assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])
        if container.get("name", "").startswith("ray-"):
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


@overlays
def test_ephemeral_storage_can_be_used(overlay):
    """The root is read-only: what a container may write is under /tmp, HOME, and bounded by the limit alone."""
    for _, pod in pods(overlay):
        for container in (c for c in pod["containers"] if c["name"].startswith("ray-")):
            (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == "/tmp")
            assert {"name": mount["name"], "emptyDir": {}} in pod["volumes"]
            assert {"name": "HOME", "value": "/tmp"} in container["env"]


@overlays
def test_devices(overlay):
    """Heads count no GPUs of their machine; where workers have some, drivers want them and wait for the first one for
    a while; the autoscaler's number of workers is in no manifest; one quota is for all clusters."""
    specs = [n for o in objects(overlay) for n in walk(o) if "rayVersion" in n]
    for spec in specs:
        head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
        assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
        (container,) = head["template"]["spec"]["containers"]
        told = {e["name"]: e["value"] for e in container["env"] if e["name"].startswith("POLYCONCEPT_")}
        if overlay != "dev":
            assert told.keys() == {"POLYCONCEPT_GPU", "POLYCONCEPT_DEVICE_WAIT"} and told["POLYCONCEPT_GPU"] == "1"
            assert float(told["POLYCONCEPT_DEVICE_WAIT"]) > 0
        assert all(("replicas" in group) != spec.get("enableInTreeAutoscaling", False) for group in workers)
    if overlay != "dev":
        (quota,) = (o["spec"]["hard"] for o in objects(overlay) if o["kind"] == "ResourceQuota")
        assert quota == {"requests.nvidia.com/gpu": str(specs[0]["workerGroupSpecs"][0]["maxReplicas"])}


@overlays
def test_tokens_and_keys_are_where_they_are_needed(overlay):
    """The service account's token in the autoscaler's container, which KubeRay puts beside the head's; the key that
    releases are signed with where drivers run."""
    for spec in (n for o in objects(overlay) for n in walk(o) if "rayVersion" in n):
        head, *workers = (g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
        text = json.dumps(workers)
        assert "signing" not in text and "serviceAccountToken" not in text.replace("automountServiceAccountToken", "")
        volumes = {volume["name"]: volume for volume in head["volumes"]}
        mounted = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
        assert volumes["signing"]["secret"] == {"secretName": "signing-key", "optional": True}
        assert set(mounted) == {"store", "tmp", "jobs", "signing"}
        if overlay != "dev":
            (mount,) = (m for m in spec["autoscalerOptions"]["volumeMounts"] if m["name"] not in mounted)
            assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
            files = {item["path"] for item in walk(volumes[mount["name"]]) if "path" in item}
            assert files == {"token", "ca.crt", "namespace"}
        assert set(volumes) - set(mounted) == ({"kubernetes"} if overlay != "dev" else set())


@overlays
def test_versions_are_those_of_the_project(overlay):
    for item in objects(overlay):
        for node in walk(item):
            assert node.get("rayVersion", PINNED["ray"]) == PINNED["ray"]
            if isinstance(image := node.get("image"), str):
                assert image == IMAGE or image.startswith("rancher/kubectl:v"), image


@overlays
def test_another_registry_is_named_in_one_place(overlay, tmp_path):
    base = os.path.relpath(ROOT / "k8s" / "overlays" / overlay, tmp_path)
    images = [{"name": "polyconcept", "newName": "registry.example.com/polyconcept"}]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], "images": images}))
    found = {n["image"] for o in render(str(tmp_path)) for n in walk(o) if isinstance(n.get("image"), str)}
    assert {image for image in found if "kubectl" not in image} == {f"registry.example.com/{IMAGE}"}
    assert not any("image:" in text for o in render(str(tmp_path)) for text in o.get("data", {}).values())


def test_overlays_of_ones_own(tmp_path):
    """By the commands of docs/operations.md: what the component changes is in both, and in the jobs' clusters."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (block,) = re.findall(r"(?ms)^    mkdir -p k8s/overlays/ours.*?(?=^\S)", (ROOT / "docs/operations.md").read_text())
    subprocess.run(["bash", "-euc", textwrap.dedent(block)], cwd=tmp_path, check=True)
    shared = []
    for overlay, file in (("ours-cron", "retrain.yaml"), ("ours-batch", "batch.yaml")):
        with (tmp_path / "k8s/overlays" / overlay / file).open("a") as f:
            f.write("# ours\n")
        found = render(str(tmp_path / "k8s/overlays" / overlay))
        (text,) = (o["data"][file] for o in found if file in o.get("data", {}))
        assert text.endswith("# ours\n")
        images = {n["image"] for o in found for n in walk(o) if isinstance(n.get("image"), str)}
        assert images == {f"REGISTRY/{IMAGE}"}
        cluster, job = [n for o in found for n in walk(o) if "rayVersion" in n]
        assert cluster == job and cluster["workerGroupSpecs"][0]["maxReplicas"] == 4
        (quota,) = (o["spec"]["hard"] for o in found if o["kind"] == "ResourceQuota")
        assert quota == {"requests.nvidia.com/gpu": "6"}
        shared.append(cluster)
    assert shared[0] == shared[1]
    (volume,) = (o["spec"] for o in render(str(tmp_path / "k8s/overlays/ours-store")) if "spec" in o)
    assert volume["storageClassName"] == "CLASS" and volume["accessModes"] == ["ReadWriteMany"]


def test_what_an_operator_adds(tmp_path):
    """Patches of docs/operations.md for a component of one's own, and the component for Kueue: objects follow their
    schemas still, and jobs' clusters have it all."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    blocks = re.findall(
        r"(?ms)^    (?:mkdir -p k8s/overlays/ours|cat >> k8s).*?(?=^\S)", (ROOT / "docs/operations.md").read_text()
    )
    assert len(blocks) == 2
    subprocess.run(["bash", "-euc", "\n".join(map(textwrap.dedent, blocks))], cwd=tmp_path, check=True)
    batch = tmp_path / "k8s/overlays/ours-batch/kustomization.yaml"
    named, more = "components: [../ours]", "components: [../ours, ../../components/kueue]"
    assert f"`{more}`" in (ROOT / "docs/operations.md").read_text()
    batch.write_text(batch.read_text().replace(named, more))
    found = render(str(batch.parent))
    for item in (o for o in found if o["apiVersion"] == "ray.io/v1"):
        jsonschema.Draft202012Validator(kuberay_schema(item["kind"])).validate(item)
    (job,) = (o for o in found if o["kind"] == "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "polyconcept"
    gpu, cpu = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {"nodeSelector", "runtimeClassName", "priorityClassName"} <= set(gpu["template"]["spec"])
    assert gpu["replicas"] == gpu["minReplicas"] == gpu["maxReplicas"] == 4
    assert not job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert cpu["groupName"] == "cpu" and "nvidia.com/gpu" not in json.dumps(cpu)


def test_image_holds_the_project():
    lines = (ROOT / "k8s" / "Dockerfile").read_text().splitlines()
    assert any(IMAGE in line for line in lines)
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    sent = {line[1:] for line in (ROOT / "k8s" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert set(copied) == sent
    assert {package.split(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]} <= set(copied)
    extras = {name for line in lines for name in re.findall(r"more\['(\w+)'\]", line)}
    assert extras == {"train", "cluster", "gpu", "s3", "sign"}
    assert "USER 1000:1000" in lines and "xformers" in PINNED
    assert not any("VISIBLE_DEVICES=" in line for line in lines)  # the device plugin says which, to whom it gives some
    # what changes with every build comes after the layers
    *_, argument, environment, command = lines
    assert (argument, environment) == ('ARG GIT_COMMIT=""', "ENV GIT_COMMIT=${GIT_COMMIT}") and command[:4] == "CMD "


@overlays
def test_secrets_are_named_only(overlay):
    specs = [n for o in objects(overlay) for n in walk(o) if "rayVersion" in n]
    assert specs and all(n["authOptions"] == {"mode": "token", "secretName": "ray-token"} for n in specs)
    for item in objects(overlay):
        assert item["kind"] != "Secret"
        for node in walk(item):
            if re.search("TOKEN|SECRET|PASSWORD|_KEY", str(node.get("name", ""))):
                assert "value" not in node
    text = "".join(path.read_text() for path in (ROOT / "k8s").rglob("*.yaml"))
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30}|-----BEGIN", text)


@overlays
def test_dashboard_and_gcs_are_closed(overlay):
    policies = {o["metadata"]["name"]: o["spec"] for o in objects(overlay) if o["kind"] == "NetworkPolicy"}
    assert policies["deny-ingress"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    nodes = {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}
    among, metrics = policies["ray-nodes"]["ingress"]
    assert among == {"from": [nodes]} and [port["port"] for port in metrics["ports"]] == [8080]
    (dashboard,) = policies["ray-dashboard"]["ingress"]
    submitter, operator = dashboard["from"]
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay"}
    assert [port["port"] for port in dashboard["ports"]] == [8265]
    assert operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    for item in objects(overlay):
        for node in walk(item):
            if "submitterPodTemplate" in node:
                labels = node["submitterPodTemplate"]["metadata"]["labels"]
                assert labels.items() >= submitter["podSelector"]["matchLabels"].items()


@overlays
def test_the_clouds_credentials_are_out_of_reach(overlay):
    """Of all pods; names, the world and the cluster are within it."""
    (policy,) = (o["spec"] for o in objects(overlay) if "Egress" in o.get("spec", {}).get("policyTypes", ()))
    assert policy["podSelector"] == {}

    def open_to(address: str, port: int) -> bool:
        ip = ipaddress.ip_address(address)
        for rule in policy["egress"]:
            blocks = [peer["ipBlock"] for peer in rule.get("to", ()) if "ipBlock" in peer]
            ports = {p["port"] for p in rule.get("ports", ())}
            inside = any(
                ip in ipaddress.ip_network(block["cidr"])
                and not any(ip in ipaddress.ip_network(net) for net in block["except"])
                for block in blocks
            )
            if (inside or "to" not in rule) and (port in ports or not ports):
                return True
        return False

    for closed in ("169.254.169.254", "168.63.129.16", "192.0.0.192", "100.100.100.200", "fd00:ec2::254"):
        assert not open_to(closed, 80)
    for address, port in (("93.184.216.34", 80), ("169.254.20.10", 53), ("10.96.0.1", 443), ("2606:4700::1", 80)):
        assert open_to(address, port)
    assert {"to": [{"namespaceSelector": {}}]} in policy["egress"]


@overlays
def test_jobs_end(overlay):
    """By themselves, and before KubeRay gives them up, which does not end a job on a shared cluster. Clusters of their
    own go away, and are not made once more: a second try would end with the same exit code."""
    for item in objects(overlay):
        for spec in (node for node in walk(item) if "entrypoint" in node):
            options = shlex.split(spec["entrypoint"])
            assert 60 * float(options[options.index("--deadline") + 1]) < spec["activeDeadlineSeconds"]
            assert (
                "submitterPodTemplate" in spec or spec["submissionMode"] == "HTTPMode"
            )  # KubeRay's own would be refused
            if "clusterSelector" in spec:
                shared = [o["metadata"]["name"] for o in objects(overlay) if o["kind"] == "RayCluster"]
                assert [spec["clusterSelector"]["ray.io/cluster"]] == shared
                assert not {"backoffLimit", "shutdownAfterJobFinishes", "rayClusterSpec"} & set(spec)
            else:
                assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"]
                # a lost head is the submitter's to try again
                assert spec["backoffLimit"] == 0 and spec["submitterConfig"]["backoffLimit"]
                assert "workerGroupSpecs" in spec["rayClusterSpec"] and spec["preRunningDeadlineSeconds"]
    for item in objects(overlay):
        if item["kind"] == "CronJob":
            job = item["spec"]["jobTemplate"]["spec"]
            assert item["spec"]["concurrencyPolicy"] == "Forbid" and item["spec"]["startingDeadlineSeconds"]
            assert job["backoffLimit"] and job["activeDeadlineSeconds"] and job["ttlSecondsAfterFinished"]


@overlays
def test_jobs_run_what_there_is(overlay, tmp_path):
    """Entrypoints are modules; the file each is given is in a ConfigMap that the cluster mounts; batches are valid and
    name places that all nodes reach."""
    files = {k: v for o in objects(overlay) if o["kind"] == "ConfigMap" for k, v in o["data"].items()}
    for item in objects(overlay):
        for spec in (node for node in walk(item) if "entrypoint" in node):
            python, option, module, file, *options = shlex.split(spec["entrypoint"])
            assert (python, option) == ("python", "-m") and file.startswith("/jobs/")
            name = Path(file).name
            cluster = next(o["spec"] for o in objects(overlay) if o["kind"] == "RayCluster")
            (jobs,) = (v for v in cluster["headGroupSpec"]["template"]["spec"]["volumes"] if v["name"] == "jobs")
            mounted = {source["configMap"]["name"] for source in jobs["projected"]["sources"]}
            assert any(o["metadata"]["name"] in mounted and name in o.get("data", {}) for o in objects(overlay))
            assert importlib.util.find_spec(module)
            (tmp_path / name).write_text(files[name])
            command = {"ray_jobs.concept_batch": "run", "ray_jobs.retrain": "retrain"}[module]
            taken = {o for p in get_command(app).commands[command].params for o in p.opts}
            assert set(options[::2]) <= taken
            if command == "run":
                load_batch(tmp_path / name).check_places()
            else:
                asked = load_retraining(tmp_path / name)
                asked.check_places()
                # a job that is tried again finds the lease of the try that died
                assert 60 * float(options[options.index("--wait") + 1]) > asked.lease


@overlays
def test_heads_are_not_evicted(overlay):
    """Of no cluster, however many there are. RayClusters have no scale, so that only a whole number counts."""
    (budget,) = (o["spec"] for o in objects(overlay) if o["kind"] == "PodDisruptionBudget")
    assert budget["selector"] == {"matchLabels": {"ray.io/node-type": "head"}}
    assert isinstance(budget["minAvailable"], int) and budget["minAvailable"] > 1000
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"  # one that never gets ready blocks no drain
