"""Solution of exercise 9.

A uniform point between 0 and t_0 falls into step i with the chance w_i. Uniform steps with the
weights S w_i have the same mean, but they vary even if all f_i are the same.
"""


def draw_time(times, u):
    point = times[0] * (1 - u)
    return min(t for t in times[:-1] if t >= point)


def weight(times, i):
    return (len(times) - 1) * (times[i] - times[i + 1]) / times[0]


def spread(u, n):
    return [(j + u) / n for j in range(n)]
