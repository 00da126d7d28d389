"""Publishing and loading over HTTP, with the real clients and a Hub on loopback."""

import json
import os
import subprocess
import sys
import threading

import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from sdq_hf import SDQForImageClassification
from sdq_hf.hub import card, publish
from sdq_hf.hub.publish import PublishError, publish_folder
from tests.hub_server import HubServer, patch_client
from tests.test_modeling_sdq import create, logits

# The client's own use of a deprecated argument when it uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning")

REPO = "org-user/resnet20-sdq"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(tokens={"hf_good": "org-user", "hf_timm": "timm"}) as server:
        patch_client(monkeypatch, server, tmp_path / "home")
        yield server


@pytest.fixture(scope="module")
def model():
    """Every bitwidth from 1 to 8 in one network."""
    model = create("resnet20_cifar")
    model.set_strategy({name: 1 + i % 8 for i, name in enumerate(model.strategy.searchable)})
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model", print_size=False)
    return tmp_path / "model"


def photo(path):
    pixels = 255 * torch.rand(40, 50, 3, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.byte().numpy()).save(path)
    return path


def test_one_commit_carries_everything(hub, model):
    address = model.push_to_hub(REPO, commit_message="First")
    assert address.startswith(hub.url)
    (sha, title), _initial = hub.commits(REPO)
    assert title == "First"
    assert address.endswith(sha)
    files = hub.files(REPO)
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "plots/bits.png",
        "plots/weights.png",
    }
    assert json.loads(files["config.json"])["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_a_published_model_loads_in_every_way_to_the_same_logits(hub, model, tmp_path):
    model.push_to_hub(REPO)
    expected = logits(model)
    loaded = SDQForImageClassification.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    assert torch.equal(logits(loaded), expected)
    assert loaded.strategy == model.strategy
    assert AutoConfig.from_pretrained(REPO).architecture == "resnet20_cifar"
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(REPO)), expected)
    picture = photo(tmp_path / "photo.png")
    pixels = AutoImageProcessor.from_pretrained(REPO)(Image.open(picture))["pixel_values"]
    best = logits(model, pixels).softmax(-1).max().item()
    assert pipeline("image-classification", model=REPO)(str(picture))[0]["score"] == pytest.approx(best, abs=1e-6)
    # What is in the cache is enough.
    hub.fail = lambda method, path: 500
    again = SDQForImageClassification.from_pretrained(REPO, cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(logits(again), expected)


def test_options_of_push_are_passed_through(hub, model):
    model.push_to_hub(REPO, private=True, revision="w3", commit_message="On a branch", commit_description="Why")
    assert "model.safetensors" not in hub.files(REPO)
    assert "model.safetensors" in hub.files(REPO, "w3")
    assert hub.commits(REPO, "w3")[0][1] == "On a branch"
    assert HfApi().model_info(REPO).private
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(REPO, revision="w3")), logits(model))
    address = model.push_to_hub(REPO, create_pr=True)
    assert "/discussions/" in address
    assert "model.safetensors" not in hub.files(REPO)
    assert "model.safetensors" in hub.files(REPO, "refs/pr/1")


def test_a_pull_request_for_a_branch_that_is_missing_is_refused_and_tags_are_added(hub, model):
    with pytest.raises(PublishError, match=r"has no branch 'w9'.*leave revision out"):
        model.push_to_hub(REPO, card="---\nlicense: mit\n---\n# a", create_pr=True, revision="w9")
    model.push_to_hub(REPO, card="---\nlicense: mit\n---\n# b", revision="w9")
    assert "/discussions/" in model.push_to_hub(REPO, create_pr=True, revision="w9", tags=["flowers", "sdq"])
    tags = ModelCard(hub.files(REPO, "refs/pr/1")["README.md"].decode()).data.tags
    assert tags.count("sdq") == tags.count("flowers") == 1
    model.push_to_hub(REPO, card="---\nlicense: mit\ntags: [sdq]\n---\n# c", tags=["flowers", "sdq"])
    model.push_to_hub(REPO, card=hub.files(REPO)["README.md"].decode(), tags="flowers")
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (card.data.license, card.data.tags) == ("mit", ["sdq", "flowers"])
    assert "# c" in card.text


def test_shards_of_an_earlier_publication_are_cleared_in_the_same_commit(hub, model):
    model.push_to_hub(REPO, max_shard_size="20KB")
    shards = [name for name in hub.files(REPO) if name.startswith("model-")]
    assert len(shards) > 3
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(REPO)), logits(model))
    model.push_to_hub(REPO)
    assert not [name for name in hub.files(REPO) if name.startswith("model-") or name.endswith("index.json")]
    assert len(hub.commits(REPO)) == 3
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(REPO)), logits(model))


def test_a_saved_folder_is_published_with_the_card_that_is_in_it(hub, model, folder):
    (folder / "README.md").write_text(
        "---\nlicense: mit\n---\n# resnet20_cifar-sdq\nfrom your-name/resnet20_cifar-sdq\n"
    )
    before = {path: path.read_bytes() for path in folder.iterdir()}
    publish_folder(folder, REPO)
    assert hub.files(REPO)["README.md"].decode() == f"---\nlicense: mit\n---\n# resnet20-sdq\nfrom {REPO}\n"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    model.save_pretrained(
        folder, push_to_hub=True, repo_id="org-user/other", commit_message="By save", print_size=False
    )
    assert hub.commits("org-user/other")[0][1] == "By save"


def test_only_the_files_of_a_model_are_published_and_cleared(hub, folder):
    (folder / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/optimizer.pt", "training_args.bin", "real_weights.safetensors", "secret.txt"):
        (folder / name).write_text("mine")
    (folder / "config_link.json").symlink_to("/etc/hostname")
    publish_folder(folder, REPO)
    assert set(hub.files(REPO)) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    theirs = {"onnx/model.safetensors", "docs/plots/bits.png", "adapter_model.safetensors", "notes.md"}
    for name in theirs:
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo=name, repo_id=REPO)
    publish_folder(folder, REPO)
    assert theirs <= set(hub.files(REPO))


def test_two_publications_at_the_same_time_are_not_mixed_up(hub, model):
    model.push_to_hub(REPO)
    other, done = create("resnet20_cifar", seed=1), []

    def fail(method, path):
        """Just before the first commit arrives, another one is made."""
        if "/commit/" in path and not done:
            done.append(path)
            other.push_to_hub(REPO)
        return None

    hub.fail = fail
    with pytest.raises(PublishError, match=r"in the meantime \(412\)"):
        model.push_to_hub(REPO, max_shard_size="20KB")
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(REPO)), logits(other))


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_bad_token_and_a_foreign_name_are_explained(hub, model, monkeypatch):
    for token, message in (("hf_bad", "does not know the token"), (None, "log in with `hf auth login`")):
        with pytest.raises(PublishError, match=message):
            model.push_to_hub(REPO, token=token or False)
    with pytest.raises(PublishError, match=r"the token does not allow that \(403\)"):
        model.push_to_hub("somebody/resnet20-sdq")
    with pytest.raises(PublishError, match="no name of a repository"):
        model.push_to_hub("org//name")
    with pytest.raises(PublishError, match="does not know the token"):
        publish.check_access(REPO, token="hf_bad")
    publish.check_access(REPO)
    assert not [request for request in hub.requests if "/commit/" in request[1]]


def test_no_connection_is_explained(model, folder, monkeypatch, tmp_path):
    with HubServer(tokens={"hf_good": "org-user"}) as server:
        patch_client(monkeypatch, server, tmp_path / "home")
    with pytest.raises(PublishError, match=rf"cannot be reached.*{folder}"):
        publish_folder(folder, REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        publish_folder(folder, REPO)


def test_an_upload_cut_in_the_middle_leaves_nothing_and_the_old_model_readable(hub, model, folder, tmp_path):
    publish_folder(folder, REPO)
    before = hub.files(REPO)
    other = create("resnet20_cifar", seed=1)
    # While a large file is sent, and while the commit is.
    for cut_at in ("/storage/", "/commit/"):
        hub.fail = lambda method, path, part=cut_at: "drop" if method in ("PUT", "POST") and part in path else None
        with pytest.raises(PublishError, match="Cannot publish org-user/resnet20-sdq"):
            other.push_to_hub(REPO)
        hub.fail = None
        assert hub.files(REPO) == before
    loaded = SDQForImageClassification.from_pretrained(REPO, cache_dir=tmp_path / "fresh")
    assert torch.equal(logits(loaded), logits(model))


def test_readers_see_a_whole_model_while_others_are_published(hub, tmp_path):
    models = [create("resnet8_cifar", seed) for seed in range(3)]
    for i, one in enumerate(models):
        one.set_strategy(2 + i)
    expected = [logits(one) for one in models]
    models[0].push_to_hub(REPO)
    done, seen, problems = threading.Event(), set(), []

    def read(number):
        count = 0
        while not done.is_set() or count == 0:
            try:
                cache = tmp_path / f"cache-{number}"
                at = snapshot_download(REPO, cache_dir=cache) if number else REPO
                answer = logits(SDQForImageClassification.from_pretrained(at, cache_dir=cache))
                seen.add(next(i for i, e in enumerate(expected) if torch.equal(answer, e)))
            except Exception as error:
                problems.append(repr(error))
            count += 1

    readers = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for reader in readers:
        reader.start()
    for i in (1, 2, 0, 1, 2):
        models[i].push_to_hub(REPO)
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert seen


@pytest.mark.parametrize("text", ["---\nlicense: [mit\n---\n", "---\n- a\n- b\n---\n", "---\nmodel-index: 3\n---\n"])
def test_a_card_with_broken_metadata_is_refused_before_anything_is_sent(hub, folder, text):
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: the metadata of the card"):
        publish_folder(folder, REPO)
    assert hub.requests == []


def test_the_card_of_other_weights_is_refused_before_anything_is_sent(hub, model, folder):
    card.create_card(model, folder).save(folder / "README.md")
    # Saved again with the same weights the card is still right.
    model.save_pretrained(folder, print_size=False)
    publish_folder(folder, REPO)
    before = len(hub.requests)
    other = SDQForImageClassification.from_pretrained(folder)
    other.set_strategy(3)
    other.save_pretrained(folder, print_size=False)
    with pytest.raises(ValueError, match=r"README\.md tells of other weights than those in its folder"):
        publish_folder(folder, REPO)
    assert len(hub.requests) == before
    # A card that the user answers for.
    publish_folder(folder, REPO, card=card.create_card(other, folder))
    (folder / "README.md").unlink()
    publish_folder(folder, REPO)
    assert "On average 3.00 bits" in hub.files(REPO)["README.md"].decode()


def test_a_damaged_folder_is_not_published(hub, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        publish_folder(folder, REPO)
    assert hub.requests == []


# Remote code ---------------------------------------------------------------------------------------------------------


def test_remote_code_needs_no_import_and_leaves_no_copies(hub, model, tmp_path):
    model.push_to_hub(REPO, remote_code=True)
    code = f"""
import sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
model = AutoModelForImageClassification.from_pretrained({REPO!r}, trust_remote_code=True)
torch.save(model(torch.load(sys.argv[1])).logits, sys.argv[2])
model.save_pretrained(sys.argv[3])
print(len(pipeline("image-classification", {REPO!r}, trust_remote_code=True)(sys.argv[4])))
"""
    from tests.test_modeling_sdq import images

    torch.save(images(), tmp_path / "in.pt")
    paths = [str(tmp_path / name) for name in ("in.pt", "out.pt", "saved")] + [str(photo(tmp_path / "photo.png"))]
    environment = os.environ | hub.environment
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(model))
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    # Without the opt-in at publication there is no code in the repository.
    model.push_to_hub(REPO)
    assert not [name for name in hub.files(REPO) if name.endswith(".py")]


# The card ------------------------------------------------------------------------------------------------------------


def test_the_snippets_of_a_card_run(hub, model, tmp_path, monkeypatch, capsys):
    model.push_to_hub(REPO)
    text = hub.files(REPO)["README.md"].decode()
    snippets = card.python_snippets(text)
    assert len(snippets) == 2
    photo(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(snippet, {})
    printed = capsys.readouterr().out
    assert "score" in printed
    assert model.strategy.table() in printed


def test_a_card_tells_the_truth_about_its_model(hub, model, folder):
    model.push_to_hub(REPO, license="mit")
    files = hub.files(REPO)
    text = files["README.md"].decode()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "sdq_hf"
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["license"] == "mit"
    assert "sdq" in metadata["tags"]
    assert "base_model" not in metadata
    assert "model-index" not in metadata
    assert f"this file | {len(files['model.safetensors']) / 1e3:,.1f} kB" in text
    assert "No accuracy is claimed" in text
    assert "your-name" not in text
    for name, layer in model.strategy.items():
        assert f"| `{name}` | {layer.weight_bits} | {layer.activation_bits} | {layer.num_weights:,} |" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert line.split("(")[1].rstrip(")") in files


def test_a_pretrained_base_is_named(hub, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("test_resnet")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    # timm's own download, from the Hub on loopback.
    api = HfApi(token="hf_timm")
    api.create_repo("timm/test_resnet.r160_in1k")
    api.upload_file(
        path_or_fileobj=tmp_path / "model.safetensors",
        path_in_repo="model.safetensors",
        repo_id="timm/test_resnet.r160_in1k",
    )
    model = SDQForImageClassification.from_timm("test_resnet", pretrained=True)
    assert torch.equal(model.float_twin().conv1[0].weight, source.conv1[0].weight)
    assert model.config.id2label[1].startswith("goldfish")
    model.calibrate([torch.randn(2, 3, 160, 160)])
    model.push_to_hub(REPO)
    loaded = SDQForImageClassification.from_pretrained(REPO)
    assert loaded.config.base_model == "timm/test_resnet.r160_in1k"
    data = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert data.base_model == "timm/test_resnet.r160_in1k"
    assert data.base_model_relation == "quantized"
    assert data.license == "apache-2.0"
    # A new head is for other classes, on the same base.
    tuned = SDQForImageClassification.from_timm("test_resnet", num_labels=5, pretrained=True)
    assert tuned.config.base_model == "timm/test_resnet.r160_in1k"
    assert tuned.config.num_labels == 5


def test_a_download_that_is_cut_leaves_nothing_that_is_loaded_later(hub, model, tmp_path):
    model.push_to_hub(REPO)
    for part in ("config.json", "/storage/"):
        cut = []

        def fail(method, path, part=part, cut=cut):
            """The first answer with the file is cut in the middle, and no later one comes."""
            if method != "GET" or part not in path:
                return None
            cut.append(path)
            return "drop" if len(cut) == 1 else 503

        hub.fail = fail
        with pytest.raises(OSError, match=r"."):
            SDQForImageClassification.from_pretrained(REPO, cache_dir=tmp_path / part.strip("/"))
        with pytest.raises(OSError, match=r"."):
            SDQForImageClassification.from_pretrained(REPO, cache_dir=tmp_path / part.strip("/"), local_files_only=True)
        hub.fail = None
        loaded = SDQForImageClassification.from_pretrained(REPO, cache_dir=tmp_path / part.strip("/"))
        assert torch.equal(logits(loaded), logits(model))
