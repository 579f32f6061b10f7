"""The rules of all primitives, one file per family; importing the package registers them."""

from sharding.rules import callbacks as callbacks
from sharding.rules import contract as contract
from sharding.rules import control as control
from sharding.rules import convolution as convolution
from sharding.rules import cumulative as cumulative
from sharding.rules import data_flow as data_flow
from sharding.rules import fourier as fourier
from sharding.rules import hashes as hashes
from sharding.rules import indexing as indexing
from sharding.rules import kernels as kernels
from sharding.rules import linalg as linalg
from sharding.rules import manual as manual
from sharding.rules import pieces as pieces
from sharding.rules import places as places
from sharding.rules import pointwise as pointwise
from sharding.rules import random as random
from sharding.rules import reduce as reduce
from sharding.rules import shape as shape
from sharding.rules import shift as shift
from sharding.rules import sort as sort
from sharding.rules import window as window
