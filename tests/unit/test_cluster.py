"""Where a process stands among others: from flags and from what launchers put into the environment,
through JAX's own detection."""

import socket
import sys
import types

import pytest

from spmd.runtime import cluster as runtime_cluster
from spmd.runtime.cluster import Asked, Cluster, ClusterError, find_cluster

VARIABLES = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "KUBERNETES_", "JOB_", "TPU_", "JAX_COORD",
             "JAX_LOCAL", "CUDA_VISIBLE", "ROCR_VISIBLE", "MEGASCALE_")  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1464532992.0;tcp://10.0.0.7,10.1.0.7:50033;tcp6://[fd00::2]:51999",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


@pytest.fixture
def environ(monkeypatch):
    """Sets the environment of a process that nothing but the test started."""
    import os

    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.fixture
def names(monkeypatch):
    """What names resolve to."""
    known: dict[str, list[str]] = {}

    def getaddrinfo(host, port, **options):
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(runtime_cluster, "_own_address", lambda: "10.9.9.9")
    return known


def refused(asked):
    with pytest.raises(ClusterError) as error:
        find_cluster(asked, 1)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_process_that_nobody_started_is_alone(environ):
    assert find_cluster(Asked(), 1) is None


def test_flags_tell_all(environ):
    asked = Asked(coordinator="127.0.0.1:8476", num_processes=4, process_id=3)
    assert find_cluster(asked, 1) == Cluster("flags", "127.0.0.1:8476", "127.0.0.1:8476", 4, 3)
    assert find_cluster(Asked(num_processes=1), 1) is None


def test_slurm(environ, names):
    environ(SLURM)
    names["node07"] = ["10.0.0.7"]
    found = find_cluster(Asked(), 1)
    # The port is JAX's: from the job's number.
    assert found == Cluster("slurm", "node07:61441", "node07:61441", 4, 2, (0,))
    environ({"SLURM_PROCID": "0"})
    assert find_cluster(Asked(), 1).bind == "10.0.0.7:61441"


def test_a_task_alone_on_its_node_has_all_devices(environ, names):
    environ(SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"})
    environ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    assert find_cluster(Asked(), 1).local_devices is None


def test_tasks_of_one_node_meet_on_loopback(environ):
    environ(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_PROCID": "0"})
    found = find_cluster(Asked(), 1)
    assert (found.coordinator, found.bind) == ("127.0.0.1:61441", "127.0.0.1:61441")


def test_accelerators_that_the_launcher_shared_out_are_all_taken(environ, names):
    environ(SLURM | {"CUDA_VISIBLE_DEVICES": "3"})
    assert find_cluster(Asked(), 1).local_devices is None
    environ({"CUDA_VISIBLE_DEVICES": "2,3"})
    assert find_cluster(Asked(), 1).local_devices == (0,)


def test_one_task_is_alone(environ):
    environ(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert find_cluster(Asked(), 1) is None


def test_open_mpi(environ):
    environ(OMPI)
    assert find_cluster(Asked(), 1) == Cluster(
        "ompi", "10.0.0.7:62640", "10.0.0.7:62640", 4, 3, (1,)
    )


def test_flags_win_over_the_launcher(environ):
    environ(OMPI)
    found = find_cluster(Asked(coordinator="10.5.5.5:99", process_id=0), 1)
    assert (found.coordinator, found.bind, found.process) == ("10.5.5.5:99", "10.5.5.5:99", 0)
    assert find_cluster(Asked(cluster="none"), 1) is None


def kubernetes(monkeypatch, index):
    """A pod of a JobSet, as the package kubernetes shows it to JAX's cluster environment."""
    from jax._src.clusters import K8sCluster

    Box = types.SimpleNamespace
    labels = {"jobset.sigs.k8s.io/jobset-name": "run"}
    job = Box(metadata=Box(name="run-hosts-0", labels=labels), spec=Box(parallelism=3))
    owner = Box(controller=True, kind="Job")
    pod = Box(metadata=Box(labels={"job-name": "run-hosts-0"}, owner_references=[owner], name="p"))
    module = types.ModuleType("kubernetes")
    module.config = Box(load_incluster_config=lambda: None)
    batch = Box(read_namespaced_job=lambda name, namespace: job)
    module.client = Box(CoreV1Api=lambda: None, BatchV1Api=lambda: batch,
                        exceptions=Box(ApiException=KeyError))  # fmt: skip
    monkeypatch.setitem(sys.modules, "kubernetes", module)
    answers = {"_pod": pod, "_job": job, "_namespace": "default", "_controller": owner}
    for name, value in answers.items():
        monkeypatch.setattr(K8sCluster, name, classmethod(lambda cls, value=value: value))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.2.0.1")
    return {"KUBERNETES_SERVICE_HOST": "10.2.0.0", "JOB_COMPLETION_INDEX": str(index)}


def test_kubernetes_jobset(environ, names, monkeypatch):
    environ(kubernetes(monkeypatch, 2))
    found = find_cluster(Asked(), 1)
    assert found == Cluster("k8s", "run-hosts-0-0.run:55527", "run-hosts-0-0.run:55527", 3, 2)


def test_a_pod_that_is_of_no_job_says_how_to_go_on(environ, monkeypatch):
    from jax._src.clusters import K8sCluster

    def no_job(cls):
        raise KeyError("job-name")

    environ(kubernetes(monkeypatch, 0))
    monkeypatch.setattr(K8sCluster, "_job", classmethod(no_job))
    assert refused(Asked()) == (
        "processes started by k8s\n"
        "  why: JAX cannot tell where they meet: KeyError: 'job-name'\n"
        "  fix: give --coordinator HOST:PORT, --num-processes and --process-id; for a run of this"
        " process alone give --cluster none"
    )


def test_tpu_pod_slices(environ, names, monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster, cluster

    for module in (cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(runtime_cluster, "accelerators", lambda: "tpu")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.3.0.1")
    environ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1",
             "MEGASCALE_NUM_SLICES": "2",
             "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "t0"})  # fmt: skip
    assert find_cluster(Asked(), 1) == Cluster("gketpu", "t0:8482", "t0:8482", 4, 3)
    monkeypatch.setattr(runtime_cluster, "accelerators", lambda: "")
    assert find_cluster(Asked(), 1) is None


def test_process_0_listens_on_one_address_that_others_reach(environ, names):
    asked = Asked(coordinator="node0:99", num_processes=2, process_id=0)
    names["node0"] = ["10.0.0.1"]
    assert find_cluster(asked, 1).bind == "10.0.0.1:99"
    names["node0"] = ["127.0.1.1"]  # as Debian has it
    assert find_cluster(asked, 1).bind == "10.9.9.9:99"
    names["node0"] = ["127.0.1.1", "fd00::1"]
    assert find_cluster(asked, 1).bind == "[fd00::1]:99"
    local = Asked(coordinator="localhost:99", num_processes=2, process_id=0)
    assert find_cluster(local, 1).bind == "127.0.0.1:99"
    chosen = Asked(coordinator="node0:99", num_processes=2, process_id=0, bind="10.0.0.2")
    assert find_cluster(chosen, 1).bind == "10.0.0.2:99"


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        (
            Asked(coordinator="node0:8476"),
            ["--coordinator", "no launcher is recognised that would say the rest",
             "give --num-processes, --process-id too"],
        ),
        (
            Asked(coordinator="node0", num_processes=2, process_id=0),
            ["--coordinator node0", "it is not a host and a port",
             "write it like node0:8476, 10.0.0.1:8476 or [fd00::1]:8476"],
        ),
        (
            Asked(coordinator="a:1", num_processes=2, process_id=2),
            ["--process-id 2", "--num-processes 2 are numbered from 0", "use 0 to 1"],
        ),
        (
            Asked(num_processes=-1),
            ["--num-processes -1", "a run has at least one process", "use 1 or more"],
        ),
        (
            Asked(cluster="slrum"),
            ["--cluster slrum", "JAX knows no such cluster (did you mean 'slurm'?)",
             "the choices are auto, none, ompi, slurm, mpi4py, gcetpu, gketpu, k8s"],
        ),
        (
            Asked(cluster="slurm"),
            ["--cluster slurm",
             "this process was not started there, or a package that is needed is missing",
             "leave it out, or give --coordinator HOST:PORT, --num-processes and --process-id"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_say_where_to_meet_is_refused(environ, asked, lines):
    assert refused(asked) == f"{lines[0]}\n  why: {lines[1]}\n  fix: {lines[2]}"


def test_all_that_is_wrong_is_told(environ):
    assert refused(Asked(coordinator="x", cluster="y", num_processes=-2)).startswith("3 problems")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            "OMPI_COMM_WORLD_SIZE=4\n"
            "  why: Open MPI started 4 processes, and JAX does not recognise it\n"
            "  fix: install mpi4py and give --cluster mpi4py, or give --coordinator HOST:PORT,"
            " --num-processes and --process-id; for a run of this process alone give --cluster"
            " none",
        ),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"},
            "SLURM_NTASKS=2\n  why: the job has several tasks, and this process is none of them\n"
            "  fix: start it with srun; for a run of this process alone give --cluster none",
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            "JOB_COMPLETION_INDEX=0\n  why: this pod is one of an indexed job, and the package"
            ' kubernetes is not installed\n  fix: pip install "jax[k8s]", or',
        ),
    ],
    ids=["mpi", "slurm-without-srun", "kubernetes"],
)
def test_processes_that_do_not_know_each_other_do_not_train_alone(environ, variables, message):
    environ(variables)
    assert refused(Asked()).startswith(message)
    assert find_cluster(Asked(cluster="none"), 1) is None
