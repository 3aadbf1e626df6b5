"""Detect a coding agent by the environment variables that it sets for the programs it starts."""

import os
from collections.abc import Mapping

# As their documentation or source has it; AGENT and AI_AGENT are the two common proposals (agentsmd/agents.md issue 136).
VARIABLES = (
    "CLAUDECODE", "CLAUDE_CODE", "CLAUDE_CODE_ENTRYPOINT", "CURSOR_AGENT", "GEMINI_CLI", "CODEX_SANDBOX", "CODEX_CI",
    "CODEX_THREAD_ID", "COPILOT_CLI", "OPENCODE", "OPENCODE_CLIENT", "CLINE_ACTIVE", "GOOSE_TERMINAL", "AUGMENT_AGENT",
    "ANTIGRAVITY_AGENT", "TRAE_AI_SHELL_ID", "AI_AGENT", "AGENT",
)  # fmt: skip
_UNSET = ("", "0", "false", "no", "none")


def detect_agent(chosen: bool | None = None, environment: Mapping[str, str] | None = None) -> str | None:
    """Return the sign of a coding agent, such as "CLAUDECODE is set"; None if a person gives the command.

    Args:
        chosen: the setting `detect_agent`; None: look at the environment.
        environment: os.environ unless given.
    """
    if chosen is not None:
        return "agent=true" if chosen else None
    variables = os.environ if environment is None else environment
    variable = next((name for name in VARIABLES if variables.get(name, "").strip().lower() not in _UNSET), None)
    # Every terminal in Cursor has a trace; its agent's also has a pager that does not wait for a key.
    cursor = variables.get("CURSOR_TRACE_ID") and variables.get("PAGER", "").endswith("| cat")
    role = variables.get("CURSOR_EXTENSION_HOST_ROLE") == "agent-exec"
    variable = variable or ("CURSOR_TRACE_ID" if cursor else "CURSOR_EXTENSION_HOST_ROLE" if role else None)
    return f"{variable} is set" if variable else None
