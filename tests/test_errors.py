"""The error tree: every leaf has a status, and the picture of the tree tells the truth."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from serving import errors
from serving.errors import PROBLEMS, RequestError, ServerError, ServingError


def subclasses(parent: type[ServingError]) -> Iterator[type[ServingError]]:
    """All below `parent` that errors.py defines, whatever other tests may have derived."""
    for child in parent.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from subclasses(child)


TREE = list(subclasses(ServingError))
LEAVES = [error for error in TREE if not any(subclasses(error))]


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_has_a_problem(leaf: type[ServingError]) -> None:
    assert leaf in PROBLEMS


def test_only_leaves_have_problems() -> None:
    assert set(PROBLEMS) == set(LEAVES)


@pytest.mark.parametrize(("leaf", "problem"), PROBLEMS.items())
def test_the_client_s_errors_are_4xx_and_ours_5xx(leaf: type[ServingError], problem: errors.Problem) -> None:
    assert issubclass(leaf, RequestError) != issubclass(leaf, ServerError)
    assert problem.status // 100 == (4 if issubclass(leaf, RequestError) else 5)


def test_titles_are_short_and_tell_problems_apart() -> None:
    titles = [problem.title for problem in PROBLEMS.values()]
    assert len(set(titles)) == len(titles)
    assert all(re.fullmatch(r"[A-Z][a-z ]{4,40}", title) for title in titles)


def test_the_drawn_tree_names_every_error_with_its_status() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\d{3})?", errors.__doc__ or ""))
    statuses = {leaf.__name__: str(problem.status.value) for leaf, problem in PROBLEMS.items()}
    assert drawn == {error.__name__: statuses.get(error.__name__, "") for error in TREE}


@pytest.mark.parametrize("leaf", LEAVES)
def test_an_error_s_text_is_what_it_was_raised_with(leaf: type[ServingError]) -> None:
    with pytest.raises(ServingError, match=r"^the image is empty$"):
        raise leaf("the image is empty")
