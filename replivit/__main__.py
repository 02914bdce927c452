from replivit.cli.main import main

main()
