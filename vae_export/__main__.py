"""`python -m vae_export` is `vae-export`."""

from vae_export.commands.app import main

if __name__ == "__main__":
    main()
