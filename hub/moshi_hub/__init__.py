"""The hub's side: create a hub, verify contributions, merge rounds, publish them."""
