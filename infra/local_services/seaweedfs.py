"""How SeaweedFS is started, the same in every profile: the whole store in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from infra.local_services.ports import GRPC_OFFSET, HOST
from infra.local_services.store_certificate import certificate_variables


def store_command(
    weed: str, data: PurePath, identities: PurePath, ports: Mapping[str, int], bind: str
) -> tuple[str, ...]:
    """The command line.

    Args:
        weed: The program.
        data: Folder of what is stored.
        identities: File that says which key may do what.
        ports: By part of the store.
        bind: Interface to listen on.
    """
    command = [
        weed,
        "-logtostderr=true",  # into our log alone; else it fills the folder for temporary files as well
        "mini",
        f"-dir={data}",
        f"-ip={HOST}",
        f"-ip.bind={bind}",
        f"-s3.config={identities}",
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.preStopSeconds=0",
    ]
    for role, port in ports.items():
        command += [f"-{role}.port={port}", f"-{role}.port.grpc={port + GRPC_OFFSET}"]
    return tuple(command)


def store_variables(secrets: Mapping[str, str], bucket: str, data: PurePath, tls: PurePath) -> dict[str, str]:
    """Its variables: none of ours but its keys.

    Args:
        secrets: Hold the keys with which its parts sign their requests to each other.
        bucket: Made at the start.
        data: Folder of what is stored.
        tls: Folder of the certificate that its parts show each other.
    """
    return {
        "S3_BUCKET": bucket,
        # Without these the parts behind the S3 gateway would serve every object to anybody on this machine.
        "WEED_JWT_SIGNING_KEY": secrets["store_volume_write_key"],
        "WEED_JWT_SIGNING_READ_KEY": secrets["store_volume_read_key"],
        "WEED_JWT_FILER_SIGNING_KEY": secrets["store_filer_write_key"],
        "WEED_JWT_FILER_SIGNING_READ_KEY": secrets["store_filer_read_key"],
        **certificate_variables(tls),
        "HOME": str(data),  # else it would read the user's ~/.seaweedfs
    }
