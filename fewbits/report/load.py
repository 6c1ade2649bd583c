"""Reading the run folder: the result, and the logged steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fewbits.errors import DataError
from fewbits.report.schema import Result

CURE = "write it again with 'fewbits run', or restore the file, then call 'fewbits report'"


@dataclass(frozen=True)
class Log:
    """The lines of ``metrics.jsonl``. ``cut``: the last line was half written, as a killed run leaves it."""

    lines: list[dict[str, Any]]
    cut: bool = False


def read_result(path: Path) -> Result:
    """Read ``result.json``. Raises DataError, naming file, key and cure, where it is missing or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist, so there is nothing to report; give the --out folder of a finished "
            "'fewbits run', or finish that run with 'fewbits resume'"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; {CURE}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(data).__name__}; {CURE}")
    try:
        return Result.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {key}: {first['msg']}, got {first['input']!r:.80}; {CURE}") from error


def read_log(path: Path) -> Log:
    """Read ``metrics.jsonl``; a missing file is an empty log.

    Only the last line may be cut off: that is what a kill leaves. Any other malformed line raises DataError.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; {CURE}") from error
    numbered = [(n, text) for n, text in enumerate(texts, 1) if text.strip()]
    lines: list[dict[str, Any]] = []
    for number, text in numbered:
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == numbered[-1][0]:
                return Log(lines, cut=True)
            raise DataError(f"{path}, line {number} is not JSON: {text!r:.80}; delete that line, or {CURE}") from error
        if not isinstance(line, dict):
            raise DataError(f"{path}, line {number} must be a JSON object, got {text!r:.80}; {CURE}")
        lines.append(line)
    return Log(lines)
