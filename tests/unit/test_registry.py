"""Selection: the first that can, and the reason of every other one."""

from dataclasses import dataclass

from slipstream.backends.registry import Choice, Refusal, eligible, select


@dataclass
class Thing:
    id: str
    missing: str | None = None
    limit: int = 10

    def available(self):
        return self.missing

    def ineligible(self, request):
        return f"{request}: {self.id} takes up to {self.limit}" if request > self.limit else None


A, B, C = Thing("a", missing="a is not installed"), Thing("b", limit=3), Thing("c")


def test_first_that_can_with_the_reasons_before_it():
    choice = select([A, B, C], 5)
    assert isinstance(choice, Choice)
    assert choice.candidate is C
    assert choice.rejected == {"a": "a is not installed", "b": "5: b takes up to 3"}


def test_refusal_says_why_for_each():
    refusal = select([A, B], 5)
    assert isinstance(refusal, Refusal)
    assert str(refusal) == "a: a is not installed; b: 5: b takes up to 3"
    assert str(select([], 5)) == ""


def test_a_candidate_that_cannot_take_the_request_is_not_asked_whether_it_is_installed():
    class Imports(Thing):
        def available(self):
            raise AssertionError("imported for nothing")

    choice = select([Imports("slow", limit=3), C], 5)
    assert choice.rejected == {"slow": "5: slow takes up to 3"}


def test_eligible_keeps_the_order_and_obeys_what_is_disabled():
    fit, reasons = eligible([C, A, B], 2, {"c": "c failed"})
    assert fit == [B]
    assert reasons == {"c": "c failed", "a": "a is not installed"}
