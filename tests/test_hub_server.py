"""The loopback Hub answers the real clients as the Hub would, also when things go wrong."""

import hashlib
import http.client
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig

from tests.hub_server import HubServer, patch_client

# The client's own: it uploads large files with httpx's deprecated `data=`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning")

MODEL = "org-user/model"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b'{"model_type": "bert", "hidden_size": 12}',
    "model.safetensors": bytes(range(256)) * 40,
    "plots/a picture.png": b"\x89PNG" + bytes(500),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(tokens={"hf_good": "org-user", "hf_other": "someone"}) as hub:
        patch_client(monkeypatch, hub, tmp_path / "home")
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_good")


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        (path := tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


@pytest.fixture
def model(api, folder):
    api.create_repo(MODEL)
    api.upload_folder(repo_id=MODEL, folder_path=folder, commit_message="Add the model")
    return MODEL


def read(path):
    return Path(path).read_bytes()


def read_folder(path):
    files = (file for file in Path(path).rglob("*") if file.is_file())
    return {name: read(file) for file in files if not (name := str(file.relative_to(path))).startswith(".cache")}


def add(path, data):
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)


def status(error):
    return error.value.response.status_code


def test_a_folder_comes_back_as_it_was_uploaded(hub, api, model, tmp_path):
    assert [title for _, title in hub.commits(model)] == ["Add the model", "initial commit"]
    assert hub.files(model) == FILES | {".gitattributes": hub.files(model, hub.commits(model)[-1][0])[".gitattributes"]}
    assert read_folder(api.snapshot_download(model)) == hub.files(model)
    assert read_folder(snapshot_download(model, local_dir=tmp_path / "local")) == hub.files(model)

    info = api.model_info(model, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes == {name: len(data) for name, data in hub.files(model).items()}
    assert {sibling.rfilename for sibling in info.siblings if sibling.lfs} == {
        "model.safetensors",
        "plots/a picture.png",
    }
    assert info.sha == hub.commits(model)[0][0]
    assert [commit.title for commit in api.list_repo_commits(model)] == ["Add the model", "initial commit"]
    assert api.whoami()["name"] == "org-user"


def test_what_has_not_changed_is_neither_sent_nor_committed(hub, api, model, folder):
    hub.requests.clear()
    api.upload_folder(repo_id=model, folder_path=folder)
    (folder / "config.json").write_bytes(b"{}")
    api.upload_folder(repo_id=model, folder_path=folder, commit_message="Change the configuration")
    assert [title for _, title in hub.commits(model)] == ["Change the configuration", "Add the model", "initial commit"]
    assert not [target for method, target in hub.requests if method == "PUT"]


def test_trees_and_paths(api, model):
    paths = [entry.path for entry in api.list_repo_tree(model, recursive=True)]
    assert paths == [".gitattributes", "README.md", "config.json", "model.safetensors", "plots", "plots/a picture.png"]
    assert [entry.path for entry in api.list_repo_tree(model)] == [path for path in paths if "/" not in path]
    (picture,) = api.list_repo_tree(model, "plots", expand=True)
    assert (picture.lfs.sha256, picture.size) == (hashlib.sha256(FILES["plots/a picture.png"]).hexdigest(), 504)
    assert picture.last_commit.title == "Add the model"
    folder, config = api.get_paths_info(model, ["plots", "config.json", "nothing"])
    assert (folder.path, config.path, config.size) == ("plots", "config.json", len(FILES["config.json"]))
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(model, "nothing"))
    with HfFileSystem().open(f"{model}/model.safetensors") as file:  # it asks for ranges
        file.seek(-300, os.SEEK_END)
        assert file.read(10) == FILES["model.safetensors"][-300:-290]


def test_requests_are_bounded(hub):
    connection = http.client.HTTPConnection(*hub.url.removeprefix("http://").split(":"), timeout=10)
    connection.request("PUT", "/storage/x", body=None, headers={"Content-Length": "1000000000"})
    assert connection.getresponse().status == 413
    connection.close()


def test_branches_tags_and_pull_requests_are_separate(hub, api, model):
    first = hub.commits(model)[0][0]
    api.create_tag(model, tag="v1", tag_message="The first")
    api.create_branch(model, branch="wip/bits", revision="v1")
    with pytest.raises(HfHubHTTPError):
        api.create_tag(model, tag="v1")
    api.create_branch(model, branch="wip/bits", exist_ok=True)

    api.create_commit(model, [add("config.json", b"{}")], commit_message="On a branch", revision="wip/bits")
    opened = api.create_commit(model, [add("new.txt", b"new")], commit_message="A proposal", create_pr=True)
    assert (opened.pr_revision, opened.pr_num, opened.repo_url.repo_id) == ("refs/pr/1", 1, model)
    api.create_commit(model, [add("new.txt", b"newer")], commit_message="Second thoughts", revision="refs/pr/1")

    assert hub.files(model, "wip/bits")["config.json"] == b"{}"
    assert hub.files(model, "refs/pr/1")["new.txt"] == b"newer"
    assert [title for _, title in hub.commits(model, "refs/pr/1")][:2] == ["Second thoughts", "A proposal"]
    assert (
        hub.commits(model)[0][0] == hub.commits(model, "v1")[0][0] == api.model_info(model, revision="v1").sha == first
    )
    refs = api.list_repo_refs(model, include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "wip/bits"}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    assert read(api.hf_hub_download(model, "new.txt", revision="refs/pr/1")) == b"newer"

    api.delete_branch(model, branch="wip/bits")
    api.delete_tag(model, tag="v1")
    for revision in ("wip/bits", "v1", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(model, revision=revision)


def test_deleting(hub, api, model):
    api.delete_file("config.json", model)
    api.create_commit(model, [CommitOperationDelete("plots/")], commit_message="No plots")
    assert set(hub.files(model)) == {".gitattributes", "README.md", "model.safetensors"}
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(model, "config.json")
    with pytest.raises(EntryNotFoundError):
        api.delete_file("config.json", model)
    before = hub.commits(model)[2][0]
    assert read(api.hf_hub_download(model, "config.json", revision=before)) == FILES["config.json"]
    api.delete_repo(model)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(model)
    api.delete_repo(model, missing_ok=True)


def test_a_commit_on_an_old_parent_is_refused(hub, api, model):
    old = hub.commits(model)[1][0]
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(model, [add("a.txt", b"a")], commit_message="Late", parent_commit=old)
    assert status(error) == 412
    assert "a.txt" not in hub.files(model)


def test_tokens_and_namespaces(hub, api, folder):
    assert api.create_repo("private", private=True).repo_id == "org-user/private"
    assert api.create_repo("org-user/private", exist_ok=True).repo_id == "org-user/private"
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("org-user/private")
    assert status(error) == 409
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="model.safetensors", repo_id="org-user/private")
    assert read(api.hf_hub_download("org-user/private", "model.safetensors")) == b"secret"
    assert api.model_info("org-user/private").private

    other, nobody = HfApi(endpoint=hub.url, token="hf_other"), HfApi(endpoint=hub.url, token=False)
    for stranger in (other, nobody):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("org-user/private")
        with pytest.raises(RepositoryNotFoundError):
            stranger.snapshot_download("org-user/private", local_dir=folder / "stolen")
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as error:
        HfApi(endpoint=hub.url, token="hf_bad").whoami()
    assert status(error) == 401

    api.create_repo(MODEL)
    assert nobody.model_info(MODEL).sha == hub.commits(MODEL)[0][0]
    for write in (
        lambda: other.create_repo("org-user/theirs"),
        lambda: other.upload_folder(repo_id=MODEL, folder_path=folder),
        lambda: other.create_tag(MODEL, tag="v1"),
        lambda: other.delete_repo(MODEL),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            write()
        assert status(error) == 403
    assert len(hub.commits(MODEL)) == 1
    # Anyone with an account may propose.
    assert other.upload_folder(repo_id=MODEL, folder_path=folder, create_pr=True).pr_num == 1
    assert hub.files(MODEL, "refs/pr/1")["model.safetensors"] == FILES["model.safetensors"]


def test_a_large_file_that_is_not_what_was_announced_is_refused(hub, api, model):
    operation = add("model.safetensors", b"the bytes that are sent")
    operation.upload_info.sha256 = hashlib.sha256(b"the bytes that were announced").digest()
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        api.create_commit(model, [operation], commit_message="Swapped")
    assert error.value.__cause__.response.status_code == 400
    assert hub.files(model)["model.safetensors"] == FILES["model.safetensors"]
    assert len(hub.commits(model)) == 2


@pytest.mark.parametrize("part", ["/storage/", "/objects/batch", "/objects/verify", "/commit/"])
@pytest.mark.parametrize("fault", ["drop", 500])
def test_an_upload_that_fails_leaves_nothing(hub, api, folder, part, fault):
    api.create_repo(MODEL)
    hub.fail = lambda method, target: fault if part in target else None
    with pytest.raises(Exception, match=r"(?i)500|error while uploading|disconnected|reset|broken"):
        api.upload_folder(repo_id=MODEL, folder_path=folder)
    assert part in str(hub.requests)
    hub.fail = None
    assert set(hub.files(MODEL)) == {".gitattributes"}
    assert api.list_repo_files(MODEL) == [".gitattributes"]
    api.upload_folder(repo_id=MODEL, folder_path=folder)
    assert hub.files(MODEL).items() >= FILES.items()


def test_a_download_goes_on_after_a_cut(hub, api, model):
    cut = []

    def once(method, target):
        if method == "GET" and "/storage/" in target and target not in cut:
            cut.append(target)
            return "drop"
        return None

    hub.fail = once
    if huggingface_hub.__version__ < "2":  # it gives up at the first cut, and goes on when it is asked again
        for _ in range(2):
            with pytest.raises(Exception, match="peer closed connection"):
                api.hf_hub_download(model, ["model.safetensors", "plots/a picture.png"][len(cut)])
    assert read_folder(api.snapshot_download(model)) == hub.files(model)
    assert len(cut) == 2


def test_an_upload_that_failed_once_is_sent_again(hub, api, folder):
    api.create_repo(MODEL)
    hub.fail = lambda method, target: 503 if method == "PUT" and hub.requests.count((method, target)) == 1 else None
    api.upload_folder(repo_id=MODEL, folder_path=folder)
    assert len([method for method, _ in hub.requests if method == "PUT"]) == 4
    assert hub.files(MODEL).items() >= FILES.items()


def test_readers_see_whole_trees_while_commits_go_on(hub, api, tmp_path):
    def commit(number):
        data = str(number).encode() * 1000
        files = [add("a.json", data), add("b/model.safetensors", data), add("c.txt", data)]
        api.create_commit(MODEL, files, commit_message=f"Number {number}")

    def keep_committing():
        for number in itertools.takewhile(lambda _: not enough.is_set(), itertools.count(1)):
            commit(number)

    api.create_repo(MODEL)
    commit(0)
    enough = threading.Event()
    writer = threading.Thread(target=keep_committing)
    writer.start()
    seen = set()
    try:
        for attempt in range(100):
            files = read_folder(snapshot_download(MODEL, cache_dir=tmp_path / f"cache-{attempt}"))
            (data,) = {files["a.json"], files["b/model.safetensors"], files["c.txt"]}
            seen.add(data)
            if len(seen) == 4:
                break
    finally:
        enough.set()
        writer.join()
    assert len(seen) == 4


def test_datasets_loads_what_it_pushed(hub):
    data = datasets.Dataset.from_dict({"label": [0, 1, 2], "text": ["a", "b", "c"]})
    data.push_to_hub("org-user/letters")
    assert any(path.endswith(".parquet") for path in hub.files("org-user/letters", repo_type="dataset"))
    assert datasets.load_dataset("org-user/letters", split="train").to_dict() == data.to_dict()


def test_transformers_loads_and_pushes_a_configuration(hub, model):
    assert AutoConfig.from_pretrained(model).hidden_size == 12
    AutoConfig.from_pretrained(model, hidden_size=24).push_to_hub("copy")
    assert json.loads(hub.files("org-user/copy")["config.json"])["hidden_size"] == 24
    with pytest.raises(OSError, match="nothing"):
        AutoConfig.from_pretrained("org-user/nothing")


def test_a_child_process_needs_the_environment_only(hub, model):
    code = """
from huggingface_hub import snapshot_download, upload_file
print(snapshot_download("org-user/model"))
upload_file(path_or_fileobj=b"weights", path_in_repo="child.safetensors", repo_id="org-user/model")
"""
    before = hub.files(model)
    child = [sys.executable, "-c", code]
    run = subprocess.run(child, env=os.environ | hub.environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(hub.environment["HF_HOME"])
    assert read_folder(run.stdout.strip()) == before
    assert hub.files(model) == before | {"child.safetensors": b"weights"}
