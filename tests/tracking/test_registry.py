"""Versions, aliases and downloads, on a database without a server."""

from shutil import rmtree

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from aliprod.errors import Failed, Refused
from aliprod.store import commit
from aliprod.tracking import registry
from aliprod.tracking.runs import JobProgress

MODEL = "shop.resnet50.full"


def send(place, job, folder):
    tracking = place.driver()
    place.show(tracking, JobProgress(job, folder, "finished"))
    assert tracking.flush(60) == []
    return tracking


def aliases(client, name=MODEL):
    return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}


def test_best_and_last_become_versions_that_say_what_they_are(place, job, trained):
    folder = trained(job(), errors=(0.5, 0.2, 0.3))
    send(place, job(), folder)
    client = MlflowClient(place.uri)
    best, last = client.get_model_version(MODEL, "1"), client.get_model_version(MODEL, "2")
    assert aliases(client) == {"best": 1, "member": 1}
    assert best.tags == {
        "epoch": "2", "top1_error": "0.2000", "checkpoint": "best", "key": job().key,
        "sha256": commit.digests(folder / "weights")["model.safetensors"],
    }  # fmt: skip
    assert (last.tags["epoch"], last.tags["checkpoint"]) == ("3", "last")
    assert best.description == f"20.00% at epoch 2/3, best: top-1 error on val, of {str(job().key)[:12]}"
    models = client.search_logged_models([client.get_experiment_by_name("shop").experiment_id])
    assert {model.status for model in models} == {LoggedModelStatus.READY}
    assert {(metric.key, metric.value) for model in models for metric in model.metrics or []} >= {
        ("val/top1_error", 0.2), ("val/top1_error", 0.3),
    }  # fmt: skip
    assert {model.name for model in models} == {"resnet50-full-epoch002", "resnet50-full-epoch003"}


def test_a_best_epoch_that_is_the_last_is_one_version(place, job, trained):
    send(place, job(), trained(job(), errors=(0.5, 0.2)))
    versions = MlflowClient(place.uri).search_model_versions()
    assert [version.tags["checkpoint"] for version in versions] == ["best, last"]


def test_the_member_follows_the_best_of_a_changed_plan_until_a_person_moves_it(place, job, trained):
    client = MlflowClient(place.uri)
    send(place, job(digit="a"), trained(job(digit="a")))
    send(place, job(digit="b"), trained(job(digit="b")))
    assert aliases(client) == {"best": 3, "member": 3}
    client.set_registered_model_alias(MODEL, "member", "2")  # a person prefers the last epoch of the first plan
    send(place, job(digit="b"), trained(job(digit="b")))
    send(place, job(digit="c"), trained(job(digit="c")))
    assert aliases(client) == {"best": 5, "member": 2}
    choice = place.driver().registry.members(["resnet50/full"])["resnet50/full"]
    assert (choice.version, choice.key, choice.epoch) == (2, job(digit="a").key, 2)


def test_going_back_to_an_earlier_plan_brings_its_best_back(place, job, trained):
    first, second = trained(job(digit="a")), trained(job(digit="b"))
    for digit, folder in (("a", first), ("b", second), ("a", first)):
        send(place, job(digit=digit), folder)
    assert aliases(MlflowClient(place.uri)) == {"best": 1, "member": 1}


def test_a_killed_drivers_pending_model_is_replaced(place, job, trained):
    folder = trained(job(), errors=(0.5, 0.2))
    place.driver().flush(60)
    client = MlflowClient(place.uri)
    experiment = client.get_experiment_by_name("shop").experiment_id
    sha256 = commit.digests(folder / "weights")["model.safetensors"]
    tags = {"aliprod.key": job().key, "aliprod.sha256": sha256}
    orphan = client.create_logged_model(experiment, name="resnet50-full-epoch002", tags=tags)
    send(place, job(), folder)
    models = client.search_logged_models([experiment])
    assert len(models) == 1
    assert models[0].model_id != orphan.model_id


def test_members_without_the_alias_are_refused_together_with_the_page_to_cure_it(place, job, trained):
    tracking = send(place, job(), trained(job()))
    MlflowClient(place.uri).delete_registered_model_alias(MODEL, "member")
    with pytest.raises(Refused, match=r"shop\.resnet50\.full, shop\.resnet50\.dcl: no version has the alias") as told:
        tracking.registry.members(["resnet50/full", "resnet50/dcl"])
    assert "#/models/shop.resnet50.full" in told.value.advice


def test_deleting_the_chosen_version_leaves_no_member(place, job, trained):
    tracking = send(place, job(), trained(job()))
    MlflowClient(place.uri).delete_model_version(MODEL, "1")
    with pytest.raises(Refused, match="no version has the alias `member`"):
        tracking.registry.members(["resnet50/full"])


def test_a_model_that_is_deleted_while_its_plan_runs_comes_back_with_the_same_command(place, job, trained):
    tracking, folder = send(place, job(), trained(job())), trained(job())
    client = MlflowClient(place.uri)
    client.delete_registered_model(MODEL)
    with pytest.raises(Refused, match="no version has the alias `member`") as told:
        tracking.registry.members(["resnet50/full"])
    assert "The same command again gives it to the best" in told.value.advice
    tracking = place.driver()
    place.show(tracking, JobProgress(job(), folder, "reused"))
    assert tracking.flush(60) == []
    choice = tracking.registry.members(["resnet50/full"])["resnet50/full"]
    assert (choice.key, choice.epoch) == (job().key, 1)
    assert aliases(client) == {"best": 1, "member": 1}


def test_a_version_that_aliprod_did_not_write_is_refused(place, job, trained):
    tracking = send(place, job(), trained(job()))
    client = MlflowClient(place.uri)
    strange = client.create_model_version(MODEL, source=str(place.storage), await_creation_for=0)
    client.set_registered_model_alias(MODEL, "member", strange.version)
    with pytest.raises(Refused, match=r"version 3 of shop\.resnet50\.full was not written by aliprod"):
        tracking.registry.members(["resnet50/full"])


def test_tags_that_would_lead_out_of_the_storage_path_are_refused(place, job, trained):
    tracking = send(place, job(), trained(job()))
    MlflowClient(place.uri).set_model_version_tag(MODEL, "1", "key", "../../../elsewhere")
    with pytest.raises(Refused, match="its tags key and sha256 are no hashes"):
        tracking.registry.members(["resnet50/full"])


def test_a_download_is_the_committed_folder_byte_for_byte(place, job, trained, tmp_path):
    folder = trained(job())
    tracking = send(place, job(), folder)
    choice = tracking.registry.members(["resnet50/full"])["resnet50/full"]
    tracking.registry.download(choice, tmp_path / "got")
    names = sorted(path.name for path in (folder / "weights").iterdir())
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == names
    for name in names:
        assert (tmp_path / "got" / name).read_bytes() == (folder / "weights" / name).read_bytes()


def test_every_flipped_byte_of_an_artifact_is_found_at_the_download(place, job, trained, tmp_path):
    tracking = send(place, job(), trained(job()))
    choice = tracking.registry.members(["resnet50/full"])["resnet50/full"]
    [stored] = [path.parent for path in (place.storage / "mlartifacts").rglob(f"{choice.model_id}/**/config.json")]
    for path in sorted(stored.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
        with pytest.raises(Failed, match=r"version 1 of shop\.resnet50\.full does not hold the weights"):
            tracking.registry.download(choice, tmp_path / "got")
        assert not (tmp_path / "got").exists()
        path.write_bytes(content)
    tracking.registry.download(choice, tmp_path / "got")


def test_lost_artifacts_are_sent_again_by_the_next_run(place, job, trained, tmp_path):
    folder = trained(job())
    tracking = send(place, job(), folder)
    choice = tracking.registry.members(["resnet50/full"])["resnet50/full"]
    rmtree(place.storage / "mlartifacts")
    with pytest.raises(Failed, match="does not hold the weights"):
        tracking.registry.download(choice, tmp_path / "got")
    tracking = send(place, job(), folder)
    assert tracking.registry.members(["resnet50/full"])["resnet50/full"] == choice
    tracking.registry.download(choice, tmp_path / "got")
    assert commit.verify(tmp_path / "got") == []


def test_a_lost_database_is_filled_again_from_the_storage_path(place, job, trained, migrated):
    folder = trained(job())
    send(place, job(), folder)
    (place.storage / "mlflow.db").write_bytes(migrated.read_bytes())
    tracking = send(place, job(), folder)
    choice = tracking.registry.members(["resnet50/full"])["resnet50/full"]
    assert choice.sha256 == commit.digests(folder / "weights")["model.safetensors"]


def test_an_address_of_a_model_becomes_a_verified_folder(place, job, trained, tmp_path):
    folder = trained(job())
    send(place, job(), folder)
    for model in ("models:/shop.resnet50.full@best", "models:/shop.resnet50.full/1"):
        got = registry.fetch(model, place.uri, tmp_path / "fetched").folder
        assert (got / "model.safetensors").read_bytes() == (folder / "weights" / "model.safetensors").read_bytes()


def test_an_unknown_address_is_refused_with_the_nearest_name(place, job, trained, tmp_path):
    send(place, job(), trained(job()))
    advice = {
        "models:/shop.resnet50.full@mebmer": "Did you mean member?",
        "models:/shop.resnet50.ful@member": "Did you mean shop.resnet50.full?",
        "models:/shop.resnet50.full/99": "Aliases of shop.resnet50.full: best, member.",
        "models:/shop.resnet50.full": "Write models:/NAME@ALIAS or models:/NAME/VERSION.",
    }
    for model, sentence in advice.items():
        with pytest.raises(Refused) as told:
            registry.fetch(model, place.uri, tmp_path / "fetched")
        assert sentence in told.value.advice
