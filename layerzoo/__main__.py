from layerzoo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
