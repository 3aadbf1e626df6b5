"""Hydra's and OmegaConf's English: the messages that we recognise, and those that we keep off the screen.

The words are those of hydra-core 1.3.8 and 1.4, omegaconf 2.3 and 2.4. Light: imports neither.
"""

import re
import warnings
from enum import Enum

# What Hydra 1.4 says on stderr of every command. version_base and a resolver's `replace` cannot be left out on 1.3, an
# editable install is registered by hand, and a whitelist of _target_ would refuse the callbacks of users.
_NOTICES = (
    r"\s*The version_base parameter",
    r"\s*ConfigStore config",
    r"\s*register_new_resolver\(\)",
    r"\s*hydra\.utils\.instantiate\(\) resolved",
    r"\s*Hydra could not discover plugins in an editable",
)


SEARCH_PATH = " Config search path:"
"""Begins Hydra's list of the folders that it searched, at the end of a message."""


class Message(Enum):
    """A message of Hydra or OmegaConf that we say in other words, as a pattern of its text."""

    EXCLUSIVE_FLAGS = r"\AOnly one of --run"
    RESOLVE_ALONE = r"\AThe --resolve flag"
    GROUP_IS_NO_NAME = r"\AConfig group override"
    MISSING_VALUE = r"Missing mandatory value: (?P<key>[\w.]+)"
    MISSING_REFERENCE = r"key '(?P<key>[\w.]+)' not found"
    SWEEP_WITHOUT_FLAG = r"Ambiguous value for argument '(?P<key>[^=]+)=(?P<value>.*)'"


def match_message(error: BaseException, message: Message) -> re.Match[str] | None:
    """The match if an error says this, with what it names: ``key``, ``value``."""
    return re.search(message.value, str(error))


def file_of(error: BaseException) -> str | None:
    """The YAML file, without its suffix, that Hydra names at the beginning of an error."""
    match = re.match(r"In '([^']+)'", str(error))
    return match[1] if match else None


def strip_details(error: BaseException) -> str:
    """An error's message in one line, without its file and lines such as "object_type=LoraConfig"."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("object_type=", "reference_type=", "full_key:"))]
    return re.sub(r"^In '[^']+': ", "", " ".join(lines))


def silence_notices() -> None:
    """Keep Hydra 1.4's notices about names that 1.3 still needs off stderr. Safe to call again."""
    for notice in _NOTICES:
        warnings.filterwarnings("ignore", notice)
