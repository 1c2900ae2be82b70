"""Limits of disks, and settings of all volumes together, as they may be asked for. Pure; every refusal names
the field and the remedy."""

from nahtlos.model.errors import Refused
from nahtlos.model.storage import DiskLimits
from nahtlos.model.volume_settings import VolumeSettings

MAX_PARALLEL = 64
MIN_ELSEWHERE = 30.0


def checked_limits(limits: DiskLimits) -> DiskLimits:
    values = {name: getattr(limits, name) for name in limits.__struct_fields__}
    for name, value in values.items():
        if value < 0:
            raise Refused(f"{name} of {value}", field=f"limits.{name}", remedy="give 0 for no limit, or more")
    for total in ("iops", "bytes"):
        if values[total] and (values[f"{total}_read"] or values[f"{total}_write"]):
            raise Refused(
                f"{total} in all together with those of reads or writes",
                field=f"limits.{total}",
                remedy="limit either the total or the parts",
            )
        burst = values[f"{total}_burst"]
        if (burst and burst < values[total]) or (burst and not values[total]):
            raise Refused(
                f"a burst of {burst} for {values[total] or 'no limit'}",
                field=f"limits.{total}_burst",
                remedy=f"give more than the {total} it is a burst of",
            )
    if limits.burst_seconds < 1:
        raise Refused(
            f"bursts of {limits.burst_seconds} s", field="limits.burst_seconds", remedy="give 1 or more"
        )
    return limits


def checked_settings(settings: VolumeSettings) -> VolumeSettings:
    for field, value in (("parallel", settings.parallel), ("parallel_per_host", settings.parallel_per_host)):
        if not 1 <= value <= MAX_PARALLEL:
            raise Refused(f"{value} at once", field=field, remedy=f"give 1 to {MAX_PARALLEL}")
    if settings.rebuild_bytes_per_second < 0:
        raise Refused(
            f"{settings.rebuild_bytes_per_second} bytes per second",
            field="rebuild_bytes_per_second",
            remedy="0: no limit",
        )
    if settings.elsewhere_seconds < MIN_ELSEWHERE:
        raise Refused(
            f"elsewhere after {settings.elsewhere_seconds:g} s",
            field="elsewhere_seconds",
            remedy=f"give at least {MIN_ELSEWHERE:g}: a host that restarts comes back in that time",
        )
    checked_limits(settings.budget.tenants)
    checked_limits(settings.budget.copies)
    return settings
