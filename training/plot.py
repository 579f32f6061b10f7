def write_plot(folder, console):
    return None
