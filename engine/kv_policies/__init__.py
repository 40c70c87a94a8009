"""Ways to keep fewer bytes of KV, or to read fewer of them, than all that attention asks for."""
