"""Settings of every process: flag, then DRYSTONE_* environment, then file, then default.

ProcessSettings            what every process has
├── WorkerSettings         what both kinds of worker have
│   ├── prefill_worker.settings.PrefillSettings
│   └── decode_worker.settings.DecodeSettings
└── gateway.settings.GatewaySettings
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Addresses = Annotated[list[str], NoDecode, BeforeValidator(_split)]
CONFIG_ENVIRONMENT = "DRYSTONE_CONFIG"
_PREFIX = "DRYSTONE_"
# What --help would say of settings that have no default value.
_NO_DEFAULT = re.compile(r"\s*\(default( factory)?:\s*(list|gethostname|None|)\)")


class ProcessSettings(BaseSettings):
    """What every process has."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        extra="forbid",
        frozen=True,
    )
    host: str = Field("127.0.0.1", description="Address to serve gRPC on.")
    port: int = Field(0, ge=0, le=65535, description="Port to serve gRPC on; 0 takes a free one.")
    ready_file: Path | None = Field(None, description="File to write addresses to, as JSON, once requests are served.")
    exit_with_parent: int = Field(0, ge=0, description="Process id to watch; exit when it is gone. 0: watch nothing.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["json", "console"] = Field("json", description="One JSON object a line, or text for people.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Port for Prometheus /metrics; 0 serves none.")
    drain_seconds: float = Field(10.0, ge=0, description="Seconds that running work may take after SIGTERM.")
    max_message_bytes: int = Field(64 << 20, ge=1 << 20, description="Largest gRPC message taken, in bytes.")
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="OpenTelemetry collector to send spans to by gRPC, such as http://collector:4317.",
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of traces kept, of those that begin at this process."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and arguments first, then environment, then the TOML file that DRYSTONE_CONFIG names."""
        del dotenv_settings, file_secret_settings
        named = os.environ.get(CONFIG_ENVIRONMENT)
        file = (TomlConfigSettingsSource(settings_cls, toml_file=Path(named)),) if named else ()
        return (init_settings, env_settings, *file)

    @classmethod
    def from_command_line(cls, program: str, arguments: Sequence[str] | None = None) -> Self:
        """Reads flags, environment and file; prints what is wrong and exits with 2 when they do not fit."""
        return _read(cls, program, list(sys.argv[1:] if arguments is None else arguments))


class WorkerSettings(ProcessSettings):
    """What both kinds of worker have."""

    worker_id: str = Field(
        default_factory=socket.gethostname, min_length=1, max_length=128, description="Id that outlives restarts."
    )
    model: str = Field("default", description="Local Hugging Face folder, GGUF file, hub id, or 'default'.")
    model_name: str = Field("", description="Name that clients ask for; empty takes the model's own.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and KV; auto is bfloat16 where the hardware has it."
    )
    device: str = Field("cpu", description="torch device.")
    threads: int = Field(0, ge=0, description="torch threads; 0 takes all cores.")
    context_tokens: int | None = Field(None, ge=1, description="Longest prompt and answer; default the model's own.")
    kv_key_file: Path | None = Field(
        None, description="This worker's CURVE keys, from `drystone keys new`; none sends and takes KV in the clear."
    )
    kv_allowed_keys_file: Path | None = Field(
        None, description="Public keys of the workers that it exchanges KV with, one a line; read anew when it changes."
    )
    kv_transport: Literal["auto", "zmq", "gloo", "nccl"] = Field(
        "auto",
        description="What carries KV: zmq everywhere; gloo or nccl between two workers of one host that both ask for "
        "it; auto is zmq until nccl is proved.",
    )
    kv_allow_cleartext: bool = Field(
        default=False, description="Let KV leave this machine in the clear where there is no key."
    )


SettingsT = TypeVar("SettingsT", bound=ProcessSettings)


def _read(cls: type[SettingsT], program: str, arguments: list[str]) -> SettingsT:
    file: Mapping[str, Any] = {}
    try:
        arguments = _take_config_flag(arguments)
        file = _read_file()
        flags = CliSettingsSource[Any](cls, cli_prog_name=program, cli_exit_on_error=True)
        parser: argparse.ArgumentParser = flags.root_parser
        parser.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help=f"TOML file of this process's settings; {CONFIG_ENVIRONMENT} names one too.",
        )
        if {"-h", "--help"} & set(arguments):
            print(_NO_DEFAULT.sub("", parser.format_help()), end="")  # noqa: T201 - a command's help
            raise SystemExit(0)
        return cls(_cli_settings_source=flags(args=arguments))  # type: ignore[call-arg] # pydantic's own keyword
    except ValidationError as error:
        for problem in error.errors():
            print(f"{program}: {_told(problem, file)}", file=sys.stderr)  # noqa: T201 - before logging exists
    except (SettingsError, OSError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)  # noqa: T201 - before logging exists
    raise SystemExit(2)


def _told(problem: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    """What is wrong with a setting, and where it was said."""
    key, given = ".".join(str(part) for part in problem["loc"]), problem["input"]
    named = os.environ.get(CONFIG_ENVIRONMENT)
    if problem["type"] == "extra_forbidden" and key in file:
        return f"{named}: unknown setting {key!r}"
    in_file = key in file and file[key] == given and f"{_PREFIX}{key.upper()}" not in os.environ
    where = f"{named}: {key}" if in_file else f"--{key.replace('_', '-').replace('.', '-')}"
    return f"{where}: {problem['msg']} (given: {given!r})"


def _read_file() -> Mapping[str, Any]:
    """The settings in the file that is named, if one is."""
    named = os.environ.get(CONFIG_ENVIRONMENT)
    if not named:
        return {}
    if not Path(named).is_file():
        raise SettingsError(f"{CONFIG_ENVIRONMENT}: no such file: {named}")
    try:
        return tomllib.loads(Path(named).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{named}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{named}: not TOML: {error}") from error


def _take_config_flag(arguments: list[str]) -> list[str]:
    """`--config FILE` names the file before the other flags are read; the rest is returned."""
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        flag, _, given = argument.partition("=")
        if flag != "--config":
            rest.append(argument)
            continue
        named = given or next(waiting, "")
        if not named:
            raise SettingsError("--config: name a file")
        if not Path(named).is_file():
            raise SettingsError(f"--config: no such file: {named}")
        os.environ[CONFIG_ENVIRONMENT] = named
    return rest
