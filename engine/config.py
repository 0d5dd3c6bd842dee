"""The configuration: one typed model, every key with its unit and default.

Read from ``hearth.toml`` (or the file named), then overridden by ``HEARTH_…`` environment variables:
``HEARTH_PORT``, ``HEARTH_API_KEY``, and ``HEARTH_GATEWAY__WORKERS`` for ``workers`` of ``[gateway]``.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from engine.errors import nearest

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FILE = Path("hearth.toml")


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key, the reason and the next step."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GatewayConfig(_Section):
    """The HTTP front."""

    workers: int = Field(default=1, ge=1, le=64, description="Gateway processes that share the port.")
    max_body_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=1024,
        description="Largest request body, bytes; a larger one is answered 413.",
    )
    request_timeout_s: float = Field(
        default=600.0, gt=0, description="Longest a request may take in all, seconds."
    )
    connect_timeout_s: float = Field(
        default=5.0, gt=0, description="Longest wait for a runner's socket, seconds."
    )
    drain_s: float = Field(
        default=30.0, ge=0, description="Longest a stopping gateway lets requests finish, seconds."
    )
    access_log: bool = Field(default=True, description="One log line a request, with its x-request-id.")
    cors_origins: list[str] = Field(
        default_factory=list, description="Browser origins that may call the API; empty = none, ['*'] = any."
    )
    trusted_proxies: list[str] = Field(
        default_factory=list,
        description="Proxies whose X-Forwarded-For is believed: addresses or networks, ['10.0.0.0/8'].",
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, given: list[str]) -> list[str]:
        networks = [ipaddress.ip_network(each.strip(), strict=False) for each in given]
        if any(network.prefixlen == 0 for network in networks):
            raise ValueError("a network of all addresses would let every caller name an address of its own")
        return [str(network) for network in networks]


class FetchConfig(_Section):
    """How the gateway fetches an `image_url` that points to the network."""

    enabled: bool = Field(default=True, description="False: only data URLs are taken.")
    allow_private: bool = Field(
        default=False,
        description="True: addresses that are not public (loopback, private, link-local) may be fetched.",
    )
    max_bytes: int = Field(
        default=20 * 1024 * 1024, ge=1, description="Largest picture, bytes as transferred."
    )
    max_pixels: int = Field(
        default=50_000_000, ge=1, description="Largest picture, pixels (decompression bombs)."
    )
    max_images: int = Field(
        default=16, ge=1, description="Most pictures in one request; one more is answered 400."
    )
    max_total_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1, description="All fetched pictures of one request together, bytes."
    )
    timeout_s: float = Field(
        default=10.0, gt=0, description="Longest one fetch may take with its redirects, seconds."
    )
    max_redirects: int = Field(
        default=3, ge=0, description="Redirects followed; each target is checked anew."
    )


class SchedulerConfig(_Section):
    """How runners are started, watched and stopped."""

    start_timeout_s: float = Field(default=600.0, gt=0, description="Longest from start to loaded, seconds.")
    warm_timeout_s: float = Field(
        default=180.0, gt=0, description="Longest a warm-up request may take, seconds."
    )
    health_interval_s: float = Field(
        default=2.0, gt=0, description="Time between two health checks, seconds."
    )
    health_failures: int = Field(
        default=5, ge=1, description="Health checks missed in a row before a restart."
    )
    backoff_first_s: float = Field(
        default=1.0, gt=0, description="Wait before the first restart, seconds; doubles."
    )
    backoff_max_s: float = Field(default=60.0, gt=0, description="Longest wait between restarts, seconds.")
    stop_timeout_s: float = Field(
        default=15.0, gt=0, description="From SIGTERM to SIGKILL of a process group, seconds."
    )
    drain_s: float = Field(
        default=30.0, ge=0, description="Longest requests in flight may take at a stop, seconds."
    )
    concurrent_starts: int = Field(
        default=4, ge=1, description="Most runners that load at once on one device."
    )


class TiersConfig(_Section):
    """Standby models: asleep until a request comes, then woken in place of one that nobody uses."""

    wake_wait_s: float = Field(
        default=60.0,
        gt=0,
        description="Longest a request waits for its model to wake, seconds; then 503 with retry-after.",
    )
    most_waiting: int = Field(
        default=256,
        ge=1,
        description="Most requests of one gateway worker that wait for one model; one more is answered 503.",
    )
    wake_timeout_s: float = Field(
        default=120.0, gt=0, description="Longest waking or falling asleep may take, seconds; then a restart."
    )
    min_residence_s: float = Field(
        default=20.0,
        ge=0,
        description="Time that a woken model stays at least before it may make room for another, seconds.",
    )
    cpu_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Memory that runners on the CPU may take together, bytes; 0 = the host's less 1 GiB.",
    )
    host_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Host memory for the weights of sleeping GPU models, bytes; 0 = all but 10 %.",
    )


class ScalingConfig(_Section):
    """Replicas between a model's `min_replicas` and `max_replicas`, where memory is free."""

    target_in_flight: float = Field(
        default=0.8,
        gt=0,
        description="Requests in hand per replica, as a share of `max_batch`, above which one more is due.",
    )
    queue_wait_s: float = Field(
        default=1.0,
        gt=0,
        description="Wait for a stream's first event above which one more is wanted, seconds.",
    )
    up_after_s: float = Field(
        default=10.0, ge=0, description="Time that load must stay high before a replica is added, seconds."
    )
    down_after_s: float = Field(
        default=120.0, ge=0, description="Time that load must stay low before a replica goes, seconds."
    )


class FairnessConfig(_Section):
    """Whose request is next at a busy model: fair queueing over keys, weighted by their plans."""

    enabled: bool = Field(default=True, description="False: requests go to the replicas as they come.")
    most_waiting: int = Field(
        default=256,
        ge=1,
        description="Most requests of one gateway worker that wait for one model's replicas, unless the "
        "model has `max_queue`; one more, or the newest of the key that has most waiting, is answered 429.",
    )
    wait_s: float = Field(
        default=60.0,
        gt=0,
        description="Longest an interactive request waits for its turn, seconds; then 503 with retry-after.",
    )
    window_factor: float = Field(
        default=1.0,
        gt=0,
        description="Requests at a replica at once, as a multiple of its `max_batch`; all workers together.",
    )
    active_s: float = Field(
        default=10.0,
        ge=0,
        description="After its last request a key keeps its share of the window free for this long, seconds.",
    )


class WeightsConfig(_Section):
    """Where model files come from and are kept."""

    dir: Path | None = Field(
        default=None, description="Folder of prepared weights; default: <state_dir>/weights."
    )
    offline: bool = Field(default=False, description="True: never use the network; local folders only.")
    hub_endpoint: str = Field(
        default="", description="Another model hub's base URL; empty = the library's own."
    )


class MeteringConfig(_Section):
    """Keys, plans and the ledger."""

    enabled: bool = Field(
        default=True,
        description="False: nothing is recorded or charged, and no plan's limits hold (keys still do).",
    )
    database_url: str = Field(
        default="",
        # A password may stand in it.
        repr=False,
        description="PostgreSQL for several machines: postgresql://user:password@host/name; "
        "empty = the SQLite file <state_dir>/hearth.db.",
    )
    journal_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=1024 * 1024,
        description="Largest journal of one gateway worker, bytes: answered requests wait in it, some 250 "
        "bytes each, while the database is away; when it is full, new requests get 503.",
    )
    write_through: bool = Field(
        default=False,
        description="True: a request's row is in the database, not only in the local journal, before the "
        "client sees the last byte; slower. While the database is away the journal has to do.",
    )
    keep_months: int = Field(
        default=13,
        ge=0,
        le=1200,
        description="Whole months, beside the present one, for which each request's row is kept; older ones "
        "become sums for each month, key and model. 0 = for ever.",
    )


class ModelConfig(_Section):
    """What one model changes against its profile; the table's name is the model's: [models.smollm2-135m]."""

    enabled: bool = Field(default=True, description="False: a profile's model is left out.")
    tier: Literal["resident", "standby"] | None = Field(
        default=None,
        description="'resident' = always awake; 'standby' = asleep until a request comes; the profile's.",
    )
    pinned: bool | None = Field(
        default=None, description="True: once awake, a standby model never makes room for another."
    )
    priority: int | None = Field(
        default=None, description="Higher: placed and woken first, put to sleep last; 0 unless given."
    )
    replicas: int | None = Field(
        default=None, ge=1, description="Processes that serve it: both bounds at once."
    )
    min_replicas: int | None = Field(default=None, ge=1, description="Fewest processes that serve it.")
    max_replicas: int | None = Field(
        default=None, ge=1, description="Most processes that serve it, as load asks and memory allows."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of one replica.")
    memory_bytes: int | None = Field(default=None, ge=0, description="Memory budget of one replica, bytes.")
    context_length: int | None = Field(default=None, ge=1, description="Longest input plus output, tokens.")
    max_batch: int | None = Field(default=None, ge=1, description="Most requests that run together.")
    max_wait_ms: float | None = Field(
        default=None, ge=0, description="Longest wait for company, milliseconds."
    )
    max_queue: int | None = Field(default=None, ge=1, description="Most requests that wait.")
    queue_wait_s: float | None = Field(
        default=None, gt=0, description="Longest a request waits for its turn, seconds; else fairness.wait_s."
    )
    path: Path | None = Field(
        default=None, description="Local folder to load from, before the entry's sources."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Engine options, over those of the catalog."
    )


def _tenant(name: str) -> str:
    if not 0 < len(name) <= 200 or not name.isprintable() or name != name.strip():
        raise ValueError("a tenant's name has 1 to 200 printable characters and no spaces around it")
    return name


class DedicatedConfig(_Section):
    """Replicas and GPUs that one tenant owns: its keys go there, nobody else's do. The table is named by the
    tenant's name or id, as `hearth tenants list` shows them."""

    models: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Replicas of its own, always awake, by model: { smollm2-135m-instruct = 1 }. A model "
        "that is served to nobody else (neither in the profile nor in [models], or not enabled there) is "
        "served to this tenant alone.",
    )
    gpus: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        description="Numbers of GPUs of its own: its replicas stand on these, and nobody else's do; empty = "
        "its replicas stand beside the shared ones.",
    )
    spill_over: bool = Field(
        default=False,
        description="True: its requests go to shared replicas while its own are full or not ready.",
    )


class Config(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="HEARTH_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on; '0.0.0.0' = all.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 = any free one.")
    profile: str = Field(
        default="",
        description="Profile of models/profiles/; empty = the largest that fits ('tiny' without a GPU).",
    )
    state_dir: Path = Field(default=Path("var"), description="Folder for keys, state, logs and weights.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level logged."
    )
    api_key: SecretStr | None = Field(
        default=None, description="First key, instead of having one made; better given as HEARTH_API_KEY."
    )
    auth: bool = Field(
        default=True, description="False: requests need no key (only behind a proxy that checks)."
    )
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    fetch: FetchConfig = Field(default_factory=FetchConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    tiers: TiersConfig = Field(default_factory=TiersConfig)
    scaling: ScalingConfig = Field(default_factory=ScalingConfig)
    fairness: FairnessConfig = Field(default_factory=FairnessConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    metering: MeteringConfig = Field(default_factory=MeteringConfig)
    models: dict[str, ModelConfig] = Field(
        default_factory=dict, description="Per-model tables, and models to add."
    )
    dedicated: dict[Annotated[str, AfterValidator(_tenant)], DedicatedConfig] = Field(
        default_factory=dict, description="Per-tenant tables of replicas and GPUs that it owns."
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
        return env_settings, init_settings

    @property
    def weights_dir(self) -> Path:
        return (self.weights.dir or self.state_dir / "weights").expanduser().resolve()

    @property
    def log_dir(self) -> Path:
        """One file a replica, named by its id, and `gateway-N.log`."""
        return self.state_dir.expanduser().resolve() / "logs"

    @property
    def database_file(self) -> Path:
        """Keys, plans and the ledger, unless `metering.database_url` names another place."""
        return self.state_dir.expanduser().resolve() / "hearth.db"

    @property
    def ledger_dir(self) -> Path:
        """The gateway workers' journals and counters."""
        return self.state_dir.expanduser().resolve() / "ledger"

    @property
    def keys_file(self) -> Path:
        """Where keys were kept before there was a database; read once."""
        return self.state_dir.expanduser().resolve() / "keys.json"

    @property
    def keys_snapshot(self) -> Path:
        """What the gateways knew of keys last, for one that starts while the database is away."""
        return self.state_dir.expanduser().resolve() / "keys.snapshot"

    @property
    def state_file(self) -> Path:
        """What the scheduler needs to adopt processes that outlive it."""
        return self.state_dir.expanduser().resolve() / "scheduler.json"

    @property
    def routes_file(self) -> Path:
        return self.state_dir.expanduser().resolve() / "routes.json"

    @property
    def runtime_dir(self) -> Path:
        """Folder of the Unix sockets (0700): short, since a socket's path may have 107 bytes at most."""
        state = self.state_dir.expanduser().resolve()
        name = f"hearth-{os.getuid()}-{hashlib.sha256(str(state).encode()).hexdigest()[:10]}"
        return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / name

    @property
    def control_socket(self) -> Path:
        """The scheduler's own socket: GET /status, GET /routes, POST /stop."""
        return self.runtime_dir / "control.sock"


def load(file: Path | None = None, **overrides: Any) -> Config:
    """Reads the configuration.

    Args:
        file: TOML file; None = ``hearth.toml`` of the working folder where there is one.
        overrides: top-level keys that win over the file (not over the environment); None values are ignored.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown or a value is wrong.
    """
    data: dict[str, Any] = {}
    path = file or DEFAULT_FILE
    if file is not None and not file.exists():
        raise ConfigError(f"{file}: no such file. Copy hearth.example.toml there, or leave --config out.")
    if path.exists():
        try:
            data = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}.") from error
    data |= {key: value for key, value in overrides.items() if value is not None}
    _refuse_unknown_environment()
    try:
        return Config(**data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, path) for item in error.errors())) from error


#: Sections with a table for each name that a person gives.
_TABLES: dict[str, type[BaseModel]] = {"models": ModelConfig, "dedicated": DedicatedConfig}


def _explain(item: Any, path: Path) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return (
            f"{where}: {item['msg']} (got {item.get('input')!r}). Its meaning stands in hearth.example.toml."
        )
    section: Any = Config
    place = [str(part) for part in item["loc"][:-1]]
    if len(place) > 1 and place[0] in _TABLES:
        section, place = _TABLES[place[0]], place[2:]
    for part in place:
        section = _section_of(section, part)
    close = nearest(str(item["loc"][-1]), section.model_fields, most=1)
    hint = (
        f"Did you mean '{close[0]}'?" if close else f"Known here: {', '.join(sorted(section.model_fields))}."
    )
    return f"{path}: unknown key '{where}'. {hint}"


def _section_of(section: type[BaseModel], name: str) -> type[BaseModel]:
    field = section.model_fields.get(name)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else section


#: Read by the Makefile and scripts, not by the configuration.
_OTHER_VARIABLES = {"HEARTH_CONFIG", "HEARTH_VENV", "HEARTH_SET"}


def _refuse_unknown_environment() -> None:
    known = {f"HEARTH_{name.upper()}" for name in Config.model_fields}
    for variable in os.environ:
        if not variable.startswith("HEARTH_") or variable in _OTHER_VARIABLES:
            continue
        head, *rest = variable.removeprefix("HEARTH_").lower().split("__")
        section = _section_of(Config, head) if rest and head not in _TABLES else None
        if f"HEARTH_{head.upper()}" in known and (section is None or rest[0] in section.model_fields):
            continue
        every = known | {
            f"HEARTH_{name.upper()}__{key.upper()}"
            for name in ("gateway", "fetch", "scheduler", "tiers", "scaling", "weights")
            for key in _section_of(Config, name).model_fields
        }
        close = nearest(variable, every, most=1)
        hint = f"Did you mean {close[0]}?" if close else "Known names stand in hearth.example.toml."
        raise ConfigError(f"unknown environment variable {variable}. {hint}")
