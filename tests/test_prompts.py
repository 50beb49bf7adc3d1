"""Which question is asked when: a pure function of seed and step; and questions that are too long."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import ConfigError
from megatron_sdpo.rollout.prompts import ENGINE_RESERVE, PromptStream, check_lengths
from megatron_sdpo.types import Message, Question
from recipes.minipipe import BASE_MODEL


def questions(count: int) -> list[Question]:
    return [Question(f"q{i}", (Message("user", "sort " * (i + 1)),)) for i in range(count)]


def ids(stream: PromptStream, step: int) -> list[str]:
    return [question.id for question in stream.at(step)]


SIZES = {"count": st.integers(1, 12), "per_step": st.integers(1, 15), "seed": st.integers(0, 2**32)}


@settings(max_examples=80, deadline=None)
@given(**SIZES)
def test_every_epoch_asks_each_question_once(count: int, per_step: int, seed: int) -> None:
    asked = questions(count)
    stream = PromptStream(asked, per_step, seed)
    steps = 3 * count  # per_step whole epochs at least
    drawn = [id for step in range(steps) for id in ids(stream, step)]
    for epoch in range(steps * per_step // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == sorted(q.id for q in asked)


@settings(max_examples=80, deadline=None)
@given(**SIZES, shuffler=st.randoms(use_true_random=False))
def test_a_step_is_the_same_from_wherever_the_stream_comes(
    count: int, per_step: int, seed: int, shuffler: random.Random
) -> None:
    steps = list(range(12))
    in_order = PromptStream(questions(count), per_step, seed)
    expected = {step: ids(in_order, step) for step in steps}
    shuffler.shuffle(steps)
    jumping = PromptStream(questions(count), per_step, seed)
    assert {step: ids(jumping, step) for step in steps} == expected
    assert {step: ids(PromptStream(questions(count), per_step, seed), step) for step in (0, 7)} == {
        step: expected[step] for step in (0, 7)
    }


@settings(max_examples=30, deadline=None)
@given(**SIZES, step=st.integers(0, 10**6))
def test_the_cursor_counts_the_questions_drawn(count: int, per_step: int, seed: int, step: int) -> None:
    stream = PromptStream(questions(count), per_step, seed)
    assert len(stream.at(step)) == per_step
    assert stream.cursor_after(step) == (step + 1) * per_step
    assert stream.cursor_after(step) - stream.cursor_after(step - 1) == per_step


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = PromptStream(questions(50), 50, seed=1), PromptStream(questions(50), 50, seed=2)
    assert len({tuple(ids(stream, step)) for stream in (first, second) for step in range(4)}) == 8


def test_no_questions_are_refused() -> None:
    with pytest.raises(ConfigError, match="no training questions"):
        PromptStream([], 4, seed=0)


def test_questions_without_room_for_a_response_are_refused() -> None:
    chat, asked = Chat(BASE_MODEL), questions(6)
    longest = len(chat.prompt_ids(asked[-1].messages))
    fits = longest + 16 + ENGINE_RESERVE
    check_lengths(asked, chat, 16, fits)
    with pytest.raises(ConfigError) as error:
        check_lengths(asked, chat, 16, fits - 2)
    assert str(error.value) == (
        f"2 of 6 questions do not fit: 'q5' has {longest} prompt tokens, which with rollout.max_new_tokens 16 and the 2"
        f" positions that the engine keeps exceeds model.max_length {fits - 2}; raise the latter or lower"
        " max_new_tokens"
    )


def test_questions_that_share_an_id_are_all_looked_at() -> None:
    """A user's training file may use an id that the held-out questions use, too."""
    short, long = Question("q", (Message("user", "sort"),)), Question("q", (Message("user", "sort " * 50),))
    for asked in ([short, long], [long, short]):
        with pytest.raises(ConfigError, match="1 of 2 questions"):
            check_lengths(asked, Chat(BASE_MODEL), 16, 40)
