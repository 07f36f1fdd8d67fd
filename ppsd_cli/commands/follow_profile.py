"""What a profile decides, and what to say about it: the reason, and where it was made."""

from dataclasses import replace

from ppsd_cli.config import Profile, Settings
from ppsd_cli.tasks.bench.environment import environment

_AUTO = (None, "auto")
_FACTS = ("cpu", "cores", "gpus")
"""What must be the same for times of one machine to hold on another."""


def follow(flags: Settings, profile: Profile) -> Settings:
    """Flags over the profile. ``auto`` is the profile's decoder where it names one.

    A profile's shape, devices and threads belong to its decoder: plain decoding that is asked for
    takes nothing of a pipeline's, nor a pipeline anything of plain decoding's.
    """
    base = profile.settings
    if base.decoder in _AUTO:
        return flags.over(base)
    asked = flags.decoder
    if asked in _AUTO and not (base.decoder == "ar" and flags.head is not None):
        return replace(flags, decoder=None).over(base)
    wanted = "ppsd" if asked in _AUTO else asked
    if (wanted == "ar") != (base.decoder == "ar"):
        base = replace(
            base,
            exit_layer=None,
            stages=None,
            split=None,
            devices=None,
            threads=None,
            head=None,
            width=None,
            depth=None,
        )
    return replace(flags, decoder=wanted).over(base)


def profile_reason(flags: Settings, profile: Profile, decoder: str) -> str | None:
    """Why a calibrated profile has its decoder, where it decided."""
    if flags.decoder not in _AUTO or decoder != profile.settings.decoder:
        return None
    if not profile.calibrated:
        return None
    assert profile.evidence is not None
    evidence = profile.evidence
    return f"{evidence.get('reason')} (profile {profile.name}, {str(evidence.get('date'))[:10]})"


def machine_facts(devices: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The machine as profiles remember it."""
    known = dict(environment(devices))
    return tuple((name, known[name]) for name in _FACTS if name in known)


def machine_notes(profile: Profile, devices: tuple[str, ...]) -> list[str]:
    """A warning that names both machines where a profile was calibrated on another one."""
    if not profile.calibrated:
        return []
    assert profile.evidence is not None
    made = _pairs(profile.evidence.get("machine"))
    here = dict(machine_facts(devices))
    same = all(made.get(name) == here.get(name) for name in ("cpu", "cores"))
    if same and _gpus(here) <= _gpus(made):
        return []
    return [
        f"profile {profile.name} was made on {_machine(made)}, this is {_machine(here)}; "
        "its settings may not suit: run `ppsd calibrate` here"
    ]


def _gpus(facts: dict[str, str]) -> set[str]:
    """The sorts of GPUs, whatever their numbers: a run may take fewer than were measured."""
    named = facts.get("gpus", "").split(", ")
    return {each.partition(" ")[2] for each in named if each}


def _pairs(value: object) -> dict[str, str]:
    """Name and value pairs of a profile; what is no pair counts as nothing."""
    if not isinstance(value, list):
        return {}
    return {str(p[0]): str(p[1]) for p in value if isinstance(p, list) and len(p) == 2}


def _machine(facts: dict[str, str]) -> str:
    """A machine in a few words."""
    cores = f"{facts['cores']} cores" if "cores" in facts else None
    parts = [p for p in (facts.get("cpu"), cores, facts.get("gpus")) if p]
    return ", ".join(parts) or "an unknown machine"
