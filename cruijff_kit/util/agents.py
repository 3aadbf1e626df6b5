"""Is it a coding agent that gives the command? Known by what such programs set in the environment of what they start."""

import os
from collections.abc import Mapping

# As their documentation or source has it; AGENT and AI_AGENT are the two common proposals (agentsmd/agents.md issue 136).
VARIABLES = (
    "CLAUDECODE", "CLAUDE_CODE", "CLAUDE_CODE_ENTRYPOINT", "CURSOR_AGENT", "GEMINI_CLI", "CODEX_SANDBOX", "CODEX_CI",
    "CODEX_THREAD_ID", "COPILOT_CLI", "OPENCODE", "OPENCODE_CLIENT", "CLINE_ACTIVE", "GOOSE_TERMINAL", "AUGMENT_AGENT",
    "ANTIGRAVITY_AGENT", "TRAE_AI_SHELL_ID", "AI_AGENT", "AGENT",
)  # fmt: skip
_UNSET = ("", "0", "false", "no", "none")


def agent(chosen: bool | None = None, environment: Mapping[str, str] | None = None) -> str | None:
    """By what a coding agent is known; None: a person gives the command.

    Args:
        chosen: the setting `agent`; None: look at the environment.
        environment: os.environ unless given.
    """
    if chosen is not None:
        return "agent=true" if chosen else None
    found = os.environ if environment is None else environment
    named = next((name for name in VARIABLES if found.get(name, "").strip().lower() not in _UNSET), None)
    # Every terminal in Cursor has a trace; its agent's also has a pager that does not wait for a key.
    cursor = found.get("CURSOR_TRACE_ID") and found.get("PAGER", "").endswith("| cat")
    role = found.get("CURSOR_EXTENSION_HOST_ROLE") == "agent-exec"
    named = named or ("CURSOR_TRACE_ID" if cursor else "CURSOR_EXTENSION_HOST_ROLE" if role else None)
    return f"{named} is set" if named else None
