"""Writes docs/pictures/timeline.svg from a real run: python docs/pictures/make_timeline.py"""

from pathlib import Path

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.prompts import encode_chat
from ppsd_cli.commands.session import ModelChoice, make_plan
from ppsd_cli.config import Settings
from ppsd_cli.core.events import Committed, Finished
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.schedule import Limits
from ppsd_cli.runtime.engine import Drafting, open_engine
from ppsd_cli.ui.picture import timeline_svg
from ppsd_cli.ui.text import TextStream

PROMPT = "Why is the sky blue?"


def main() -> None:
    """Answer one prompt over three stages and draw what happened."""
    settings = Settings(head="smollm2-135m-3stage", devices=("cpu",))
    plan = make_plan(ModelChoice("smollm2-135m", None, None, False), settings, lambda _: None)
    tokenizer = load_tokenizer(plan.files.folder)
    stream = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), ())
    prompt = encode_chat(tokenizer, [{"role": "user", "content": PROMPT}])
    limits = Limits(72, plan.config.slots, plan.eos_ids)
    drawn = []
    with open_engine(plan.config, processes=True) as engine:
        for event in engine.answer(
            prompt, sampling=Sampling(), limits=limits, drafting=Drafting(True)
        ):
            text = None
            if isinstance(event, Committed):
                text = stream.push(event.token_id)
            elif isinstance(event, Finished):
                text = stream.finish()
            drawn.append((event, text))
    parts = [plan.config.part(stage) for stage in range(plan.config.stages)]
    layers = tuple((part.first, part.last) for part in parts)
    svg = timeline_svg(drawn, layers=layers, width=100, title=f"ppsd generate -p '{PROMPT}'")
    (Path(__file__).parent / "timeline.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
