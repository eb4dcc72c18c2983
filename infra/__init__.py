"""Everything that talks to a server or describes the deployment."""
