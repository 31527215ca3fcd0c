"""The trie of a list of answers: what may follow what, as the list itself says; large lists too."""

from __future__ import annotations

import pickle
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ofa_ds.tasks.candidates import ROOT, Candidates, Trie
from ofa_ds.terms import EOS_ID

ANSWERS = st.lists(st.lists(st.integers(4, 7), max_size=5), min_size=1, max_size=12)


@given(ANSWERS, st.lists(st.integers(4, 7), max_size=5))
def test_what_may_follow_is_what_follows_in_some_answer(answers: list[list[int]], prefix: list[int]) -> None:
    ended, size = [[*answer, EOS_ID] for answer in answers], len(prefix)
    following = {answer[size] for answer in ended if answer[:size] == prefix and len(answer) > size}
    assert Trie(answers).next(prefix) == (sorted(following) or [EOS_ID])


@given(ANSWERS)
def test_the_way_up_from_the_end_of_an_answer_is_the_answer(answers: list[list[int]]) -> None:
    trie = Trie(answers)
    assert len(trie.token_V) == 1 + len({tuple([*a, EOS_ID][:n]) for a in answers for n in range(1, len(a) + 2)})
    for answer, vertex in zip(answers, trie.end_C.tolist(), strict=True):
        assert trie.depth_V[vertex] == len(answer) + 1
        way = []
        while vertex != ROOT:
            assert trie.parent_V[vertex] < vertex  # depth first
            way.append(int(trie.token_V[vertex]))
            vertex = int(trie.parent_V[vertex])
        assert way[::-1] == [*answer, EOS_ID]


@given(ANSWERS)
def test_allowed_ids_along_an_answer_are_those_of_each_prefix(answers: list[list[int]]) -> None:
    for ends in (True, False):
        candidates = Candidates(answers=tuple(map(str, answers)), ids=tuple(map(tuple, answers)), ends=ends)
        for answer in answers:
            places = range(len(answer) + ends)
            found = [ids.tolist() for ids in candidates.allowed(answer)]
            assert found == [candidates.trie.next(answer[:place]) for place in places]


def test_a_hundred_thousand_answers_make_a_trie_in_seconds_and_their_copy_for_a_worker_is_small() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 100_000)
    ids = tuple(tuple(rng.integers(4, 50_000, length).tolist()) for length in lengths)
    candidates = Candidates(answers=tuple(map(str, range(len(ids)))), ids=ids)
    began = time.process_time()
    trie = candidates.trie
    assert time.process_time() - began < 5
    assert len(set(trie.end_C.tolist())) == len(set(ids))
    sent = pickle.dumps(candidates)
    assert len(sent) < 4_000_000
    assert pickle.loads(sent) == candidates
