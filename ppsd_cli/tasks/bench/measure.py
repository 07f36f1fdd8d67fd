"""The measuring loop: every prompt goes to every contender in turn, in an order that rotates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ppsd_cli.bench_records import Contender, Difference, Key, Question, Sample
from ppsd_cli.core.events import Event
from ppsd_cli.core.schedule import Limits
from ppsd_cli.tasks.bench.contenders import Rival
from ppsd_cli.tasks.bench.decoders import Forced, plain_logits
from ppsd_cli.tasks.bench.forced import forced_drafts, forced_tree
from ppsd_cli.tasks.bench.gates import first_difference
from ppsd_cli.tasks.bench.journal import Journal
from ppsd_cli.tasks.bench.pool import settle
from ppsd_cli.tasks.bench.rounding import rounding_tolerance
from ppsd_cli.tasks.bench.talk import Message, Talk, user

WARMUP_TOKENS = 8
_Drafting = tuple[str, int | None, str | None, int, int]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a task."""

    task: str
    question: Question


@dataclass(frozen=True, slots=True)
class Course:
    """How a run goes. ``seed`` draws the fixed-acceptance drafts."""

    asked: tuple[Asked, ...]
    limits: Limits
    repetitions: int
    warmup: int
    seed: int
    vocabulary: int


class Measurement:
    """Takes the samples of a run that its journal does not hold yet."""

    def __init__(
        self,
        rivals: Sequence[Rival],
        talk: Talk,
        course: Course,
        journal: Journal,
        show: Callable[[Sample, bool], None],
    ) -> None:
        """``rivals``: the first is plain decoding, whose answers the others are held against.

        ``show`` is called with each sample once it is known whether it equals plain decoding's,
        and with whether an earlier run had measured it.
        """
        self._rivals, self._talk, self._course = tuple(rivals), talk, course
        self._journal, self._show = journal, show
        self._restored = frozenset(journal.samples)
        self._rounds = 0
        self._own: dict[tuple[_Drafting, Key], tuple[int, ...]] = {}
        self.judged: list[Sample] = []
        """Samples that have been held against plain decoding's."""
        self.grid_events: tuple[Event, ...] = ()
        self.left_out: list[str] = []

    def run(self) -> None:
        """All that is missing. What was measured stays in the journal whatever ends this."""
        try:
            self._warm_up()
            for repetition in range(1, self._course.repetitions + 1):
                for asked in self._course.asked:
                    self._conversation(asked, repetition)
        finally:
            self._note_memory()

    def restore(self) -> None:
        """Take from the journal what is known to equal plain decoding's or how it differs."""
        for sample in self._journal.samples.values():
            place = self._journal.contenders[0].name, replace(sample.key, repetition=1)
            plain = self._journal.samples.get(place)
            if plain is None:
                continue
            if sample.difference is not None or sample.token_ids == plain.token_ids:
                self.judged.append(sample)

    def _warm_up(self) -> None:
        first = self._course.asked[0].question.turns[0]
        prompt = self._talk.encode([user(first)])
        tokens = min(WARMUP_TOKENS, self._course.limits.max_new_tokens)
        limits = replace(self._course.limits, max_new_tokens=tokens)
        for rival in self._rivals:
            for _ in range(self._course.warmup):
                rival.decoder.answer(prompt, limits)

    def _conversation(self, asked: Asked, repetition: int) -> None:
        """All turns of one question; the history holds plain decoding's answers for everyone."""
        question = asked.question
        messages: list[Message] = []
        for turn, text in enumerate(question.turns, 1):
            messages.append(user(text))
            key = Key(asked.task, question.question_id, question.category, turn, repetition)
            prompt = self._talk.encode(messages)
            if len(prompt) >= self._course.limits.context:
                self._leave_out(key)
                return
            self._round(key, prompt)
            reply = self._talk.decode(self._expected(key).token_ids)
            messages.append({"role": "assistant", "content": reply})

    def _leave_out(self, key: Key) -> None:
        if key.repetition == 1:
            self.left_out.append(f"{key.task} {key.question_id}, turn {key.turn}")

    def _round(self, key: Key, prompt: tuple[int, ...]) -> None:
        """One prompt to all contenders."""
        for rival in self._order():
            name = rival.contender.name
            if (name, key) not in self._journal.samples:
                settle()
                sample = self._measure(rival, key, prompt)
                self._journal.add(sample)
        self._rounds += 1
        for rival in self._rivals:
            self._judge(rival, key, prompt)

    def _order(self) -> list[Rival]:
        """The contenders, rotated; those whose drafts are made from an answer come after all."""
        shift = self._rounds % len(self._rivals)
        rotated = [*self._rivals[shift:], *self._rivals[:shift]]
        return sorted(rotated, key=lambda rival: rival.contender.acceptance is not None)

    def _measure(self, rival: Rival, key: Key, prompt: tuple[int, ...]) -> Sample:
        contender = rival.contender
        forced = self._forced(rival, key, prompt)
        answered = rival.decoder.answer(prompt, self._course.limits, forced)
        if contender.name == "ppsd" and not self.grid_events:
            self.grid_events = answered.events
        return Sample(
            key=key,
            contender=contender.name,
            prompt_tokens=len(prompt),
            token_ids=answered.token_ids,
            finish_reason=answered.finish_reason,
            first_token_seconds=answered.first_token_seconds,
            decode_seconds=answered.decode_seconds,
            counts=answered.counts,
            first_tokens=answered.first_tokens,
        )

    def _forced(self, rival: Rival, key: Key, prompt: tuple[int, ...]) -> Forced | None:
        """Guesses of the fixed quality."""
        contender = rival.contender
        if contender.acceptance is None:
            return None
        answer, seed = self._right_answer(rival, key, prompt), self._course.seed
        if contender.among is not None:
            fixed = contender.acceptance, contender.among
            return forced_tree(answer, fixed, contender.width, seed=seed, key=key)
        return forced_drafts(
            answer,
            acceptance=contender.acceptance,
            vocabulary=self._course.vocabulary,
            seed=seed,
            key=key,
        )

    def _expected(self, key: Key) -> Sample:
        """Plain decoding's answer: the first repetition's where that is there."""
        first = self._rivals[0].contender.name, replace(key, repetition=1)
        here = self._rivals[0].contender.name, key
        samples = self._journal.samples
        return samples[first] if first in samples else samples[here]

    def _right_answer(self, rival: Rival, key: Key, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """What fixed-acceptance drafts are made from: plain decoding's answer. For a decoder of
        wider matrices its own, drafted freely, because after a difference of rounding every draft
        from plain decoding's would be wrong; asked for here if it does not take part by itself.
        """
        contender = rival.contender
        if contender.exact:
            return self._expected(key).token_ids
        free = [r.contender for r in self._rivals if r.contender.acceptance is None]
        names = [each.name for each in free if _drafting(each) == _drafting(contender)]
        if names:
            return self._journal.samples[names[0], key].token_ids
        place = _drafting(contender), replace(key, repetition=1)
        if place not in self._own:
            self._own[place] = rival.decoder.answer(prompt, self._course.limits).token_ids
            settle()
        return self._own[place]

    def _judge(self, rival: Rival, key: Key, prompt: tuple[int, ...]) -> None:
        """Hold a sample against plain decoding's and show it."""
        sample = self._journal.samples[rival.contender.name, key]
        expected = self._expected(key)
        index = first_difference(expected.token_ids, sample.token_ids)
        if index is not None and sample.difference is None:
            difference = self._difference(rival, sample, expected, prompt, index)
            sample = self._journal.judge(sample, difference)
        self.judged.append(sample)
        self._show(sample, (sample.contender, key) in self._restored)

    def _difference(
        self, rival: Rival, sample: Sample, expected: Sample, prompt: tuple[int, ...], index: int
    ) -> Difference:
        ours, theirs = expected.token_ids[index:], sample.token_ids[index:]
        gap, tolerance = None, None
        if ours and theirs:
            engine = self._rivals[0].loaded.thing
            stepped = plain_logits(engine, prompt, index)
            at_once = plain_logits(engine, (*prompt, *expected.token_ids[:index]))
            if stepped is not None and at_once is not None:
                gap = abs(float(stepped[ours[0]] - stepped[theirs[0]]))
                tolerance = rounding_tolerance(
                    stepped, at_once, (ours[0], theirs[0]), engine.config.dtype
                )
        return Difference(
            index=index,
            expected_id=ours[0] if ours else None,
            found_id=theirs[0] if theirs else None,
            logit_gap=gap,
            tolerance=tolerance,
            same_threads_equal=self._threads_explain(rival, sample, prompt),
        )

    def _threads_explain(self, rival: Rival, sample: Sample, prompt: tuple[int, ...]) -> bool:
        """Whether an exact contender equals plain decoding with its own number of threads."""
        same = rival.contender.threads == self._rivals[0].contender.threads
        if not rival.contender.exact or same or rival.plain is None:
            return False
        again = rival.plain.answer(prompt, self._course.limits)
        return again.token_ids == sample.token_ids

    def _note_memory(self) -> None:
        for rival in self._rivals:
            peak = rival.loaded.peak_memory()
            if peak is not None:
                self._journal.remember_memory(rival.contender.name, peak)


def _drafting(contender: Contender) -> _Drafting:
    """The same for contenders that verify matrices of the same shapes with the same head."""
    c = contender
    return c.decoder, c.draft_length, c.head, c.width, c.depth
