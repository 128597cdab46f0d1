"""One module per `nemotron-h` command, each with `main(argv)`; no script imports another."""
