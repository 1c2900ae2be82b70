"""Typed identifiers. A name a person chose is an id here: they are unique per cloud and never reused
while anything still refers to them."""

import re
from typing import NewType

from nahtlos.model.errors import Refused

HostId = NewType("HostId", str)
ServerId = NewType("ServerId", str)
ServerGroupId = NewType("ServerGroupId", str)
VolumeId = NewType("VolumeId", str)
SnapshotId = NewType("SnapshotId", str)
BackupId = NewType("BackupId", str)
KeyId = NewType("KeyId", str)
"""Of a key in the keyring; the key itself never stands where this does."""
NetworkId = NewType("NetworkId", str)
SubnetId = NewType("SubnetId", str)
PortId = NewType("PortId", str)
SecurityGroupId = NewType("SecurityGroupId", str)
RouterId = NewType("RouterId", str)
FloatingIpId = NewType("FloatingIpId", str)
LoadBalancerId = NewType("LoadBalancerId", str)
ProjectId = NewType("ProjectId", str)
ReleaseId = NewType("ReleaseId", str)
"""`<component>-<version>-<first 12 hex digits of the manifest's sha256>`, e.g. `qemu-11.1.3-0f3a…`."""
ImageId = NewType("ImageId", str)
OperationId = NewType("OperationId", str)
CampaignId = NewType("CampaignId", str)
BlueprintId = NewType("BlueprintId", str)

NAME = re.compile(r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$")


def checked_name(value: str, field: str) -> str:
    """`value` if it may name a thing (a DNS label of at most 32 characters), else `Refused`."""
    if not NAME.match(value):
        raise Refused(
            f"'{value}' is no valid name",
            field=field,
            remedy="use 1 to 32 lower-case letters, digits and '-', starting with a letter",
        )
    return value
