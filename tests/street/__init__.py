"""The street: small training programs such as people write, each run bare and watched in a process of its own."""
