from lipprep.command import run
from lipprep.train.cli import train

if __name__ == "__main__":
    run(train, prog_name="python -m lipprep.train")
