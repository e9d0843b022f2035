import random

import pytest

from course_lib import card, models

FACTS = {name: "something" for name in card.FIELDS} | {
    "rejected": ["prompting: 0.1"],
    "data": ["tickets, 10 records"],
    "training": [("rank", 16)],
    "measured": [{"name": "pass", "value": 0.5, "low": 0.4, "high": 0.6, "n": 10, "share": True}],
    "gate": ["ok      pass"],
    "passed": True,
    "limits": ["English alone"],
    "training_flops": 1e13,
    "base_flops": 1.6e21,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "base_digest", lambda: "0" * 64)
    (tmp_path / "adapter_config.json").write_text('{"r": 16}')
    (tmp_path / "adapter_model.safetensors").write_bytes(random.Random(0).randbytes(3000))
    return tmp_path


@pytest.fixture
def signed(folder):
    key = card.new_key()
    card.write(folder, FACTS)
    card.sign(folder, key)
    return folder, card.public_text(key)


def test_a_signed_card_verifies(signed):
    folder, public = signed
    assert set(card.verify(folder, public)) == {"adapter_config.json", "adapter_model.safetensors"}
    text = (folder / card.CARD).read_text()
    assert text.startswith("---\nbase_model: " + models.BASE_NAME) and "| pass | 0.5 | 0.4 | 0.6 | 10 |" in text
    assert "below the third" in " ".join(text.split()) and "{{" not in text and "{%" not in text


def test_the_hub_reads_the_card(signed):
    from huggingface_hub import ModelCard

    read = ModelCard.load(signed[0] / card.CARD)
    assert read.data.library_name == "peft" and read.data.base_model == models.BASE_NAME


@pytest.mark.parametrize("name", [card.CARD, card.SIGNATURE, "adapter_config.json", "adapter_model.safetensors"])
def test_each_byte_counts(signed, name):
    folder, public = signed
    path, rng = folder / name, random.Random(1)
    whole = path.read_bytes()
    places = range(len(whole)) if name != "adapter_model.safetensors" else rng.sample(range(len(whole)), 200)
    believed = []
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        try:
            card.verify(folder, public)
            believed.append(at)
        except card.CardError:
            pass
    if name == card.SIGNATURE:  # a blank that becomes another blank leaves the signature what it was
        believed = [at for at in believed if not whole[at : at + 1].isspace()]
    assert believed == []
    for changed in (whole + b"\n", whole[:-1], whole[1:]):
        path.write_bytes(changed)
        if name == card.SIGNATURE and changed.strip() == whole.strip():
            continue
        with pytest.raises(card.CardError):
            card.verify(folder, public)
    path.write_bytes(whole)
    card.verify(folder, public)


def test_another_key(signed):
    folder, public = signed
    with pytest.raises(card.CardError, match="another key"):
        card.verify(folder, card.public_text(card.new_key()))
    card.sign(folder, card.new_key())  # somebody else signs the same card
    with pytest.raises(card.CardError, match="another key"):
        card.verify(folder, public)
    with pytest.raises(card.CardError, match="44 characters"):
        card.verify(folder, "no key")


def test_a_file_that_is_not_on_the_card(signed):
    folder, public = signed
    (folder / "extra.json").write_text("{}")
    with pytest.raises(card.CardError, match="extra.json lies beside"):
        card.verify(folder, public)
    (folder / "extra.json").rename(folder / "adapter_model.bin")
    with pytest.raises(card.CardError, match="adapter_model.bin does not belong"):
        card.verify(folder, public)
    (folder / "adapter_model.bin").unlink()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(card.CardError, match="not in the folder"):
        card.verify(folder, public)


def test_no_card_or_no_signature(signed):
    folder, public = signed
    (folder / card.SIGNATURE).unlink()
    with pytest.raises(card.CardError, match="card.sig cannot be read"):
        card.verify(folder, public)
    (folder / card.CARD).unlink()
    with pytest.raises(card.CardError, match="README.md cannot be read"):
        card.verify(folder, public)


def test_a_new_card_drops_the_old_signature(signed):
    folder, _ = signed
    card.write(folder, FACTS | {"owner": "somebody else"})
    assert not (folder / card.SIGNATURE).exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"owner": ""}, "owner"),
        ({"limits": []}, "limits"),
        ({"colour": "red"}, "no place for colour"),
        ({"measured": [{"name": "x", "value": 0.7, "low": 0.1, "high": 0.6, "n": 10}]}, "outside of its interval"),
        ({"measured": [{"name": "x", "value": 0.55, "n": 10, "share": True}]}, "no count out of 10"),
        ({"measured": [{"name": "x", "value": 98.4, "n": 10, "share": True}]}, "a share of 98.4"),
        ({"gate": ["REFUSED pass"]}, "lists a refusal"),
    ],
)
def test_cards_with_holes_and_contradictions(folder, change, said):
    with pytest.raises(card.CardError, match=said):
        card.write(folder, FACTS | change)
    assert not (folder / card.CARD).exists()


def test_no_adapter(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(card.CardError, match="nothing to write a card for"):
        card.write(folder, FACTS)


def test_compute():
    assert card.flops(135_000_000, 30_000) == pytest.approx(2.43e13)
