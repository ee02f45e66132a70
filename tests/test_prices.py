"""Prices: first estimates until somebody enters what they pay, found by the driver's names for the cards."""

from datetime import UTC, datetime

import pytest

from katherine import prices
from katherine.errors import DataError, PriceError
from katherine.settings import Home


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def today() -> str:
    return datetime.now(UTC).date().isoformat()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA B200", "B200"),
        ("", ""),
    ],
)
def test_a_card_is_priced_by_the_kind_it_is_rented_as(name, kind):
    assert prices.kind(name) == kind


def test_first_estimates_say_that_they_are_and_bear_no_date(home):
    price = prices.hourly(home, "NVIDIA H200")
    assert (price.dollars, price.dated) == (3.99, None) and "first estimate" in price.source
    assert prices.hourly(home, "NVIDIA L40S") is None


def test_an_entered_price_takes_the_first_estimates_place_until_it_is_taken_back(home):
    prices.enter(home, "H200 SXM", "$3.79")
    assert (prices.hourly(home, "NVIDIA H200").dollars, prices.hourly(home, "NVIDIA H200").dated) == (3.79, today())
    prices.enter(home, "L40S", 0.86)
    assert list(prices.listed(home)) == ["H200 SXM", "H100 SXM", "H100 PCIe", "L40S"]
    prices.forget(home, "H200 SXM")
    assert prices.hourly(home, "NVIDIA H200").dollars == 3.99
    with pytest.raises(PriceError, match="No price was entered"):
        prices.forget(home, "H200 SXM")


@pytest.mark.parametrize("dollars", ["", "cheap", "nan", "inf", "-1", "1001", "1e400", None])
def test_what_is_no_price_is_refused_in_words_and_changes_nothing(home, dollars):
    with pytest.raises(PriceError, match="H200 SXM: "):
        prices.enter(home, "H200 SXM", dollars)
    assert not prices.path(home).exists()


@pytest.mark.parametrize("kind", ["", " ", "x" * 61, "<b>H200</b>", "a=b"])
def test_what_cannot_name_a_kind_is_refused(home, kind):
    with pytest.raises(PriceError, match="cannot name"):
        prices.enter(home, kind, 1)


def test_a_pods_own_price_comes_first_for_its_card_and_is_not_another_pods(home, monkeypatch):
    monkeypatch.setenv("RUNPOD_POD_ID", "pod-a")
    prices.enter(home, prices.THIS_POD, 3.5, "NVIDIA H200")
    assert prices.hourly(home, "NVIDIA H200").dollars == 3.5
    assert prices.hourly(home, "NVIDIA H100 PCIe").dollars == 2.49
    assert prices.THIS_POD not in prices.listed(home)
    monkeypatch.setenv("RUNPOD_POD_ID", "pod-b")
    assert prices.this_pod(home) is None
    assert prices.hourly(home, "NVIDIA H200").dollars == 3.99


def test_a_machine_without_a_gpu_can_have_a_price_too(home):
    assert prices.hourly(home) is None
    prices.enter(home, prices.THIS_POD, 0, "")
    assert prices.hourly(home).dollars == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"L40S": {"dollars": "much"}}', '{"L40S": 1}'])
def test_a_damaged_price_list_is_named_and_not_taken_for_the_defaults(home, text):
    home.root.mkdir()
    prices.path(home).write_text(text)
    with pytest.raises(DataError, match=r"prices\.json"):
        prices.hourly(home, "NVIDIA H200")
