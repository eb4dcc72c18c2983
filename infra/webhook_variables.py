"""What MLflow's server needs to send its webhooks to this machine."""

from __future__ import annotations

import base64
import hashlib

from infra.settings import Settings


def webhook_server_variables(settings: Settings) -> dict[str, str]:
    """Variables of MLflow's server: by itself it delivers to public addresses alone. Empty if none are received."""
    if settings.webhook_secret is None:
        return {}
    # The secret lies in MLflow's database under this key; a random one would be another after every start.
    key = hashlib.sha256(b"mlflow webhooks " + settings.webhook_secret.get_secret_value().encode()).digest()
    return {
        "MLFLOW_WEBHOOK_CACHE_TTL": "5",  # for a minute, the default, it would not know of a new subscription
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(key).decode(),
    }
