"""The shm transport, and pools that exchange pages."""
