from benchmarks.machine_code.cli import main

raise SystemExit(main())
