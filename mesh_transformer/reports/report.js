// Theme switch, and display of the values of a plot at the pointer.

const root = document.documentElement;
const requestedTheme = new URLSearchParams(location.search).get('theme');
if (requestedTheme) root.dataset.theme = requestedTheme;

function isDark() {
  if (root.dataset.theme) return root.dataset.theme === 'dark';
  return matchMedia('(prefers-color-scheme: dark)').matches;
}

document.getElementById('theme').onclick = () => {
  root.dataset.theme = isDark() ? 'light' : 'dark';
};

// Left and right end of the x axis, and width of a plot, as in FRAME of svg.py.
const [left, right, width] = [58, 626, 640];

function nearest(points, x) {
  return points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
}

for (const svg of document.querySelectorAll('svg[data-plot]')) {
  const data = JSON.parse(svg.dataset.plot);
  const [low, high] = data.x;
  const output = svg.parentNode.querySelector('output');
  const pointer = svg.querySelector('.pointer');

  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect();
    const x = Math.min(Math.max((event.clientX - box.left) / box.width * width, left), right);
    const value = low + (x - left) / (right - left) * (high - low);
    const values = data.series.map(series => [series.name, nearest(series.points, value)]);
    const step = values[0][1][0];
    const pointerX = left + (step - low) / (high - low || 1) * (right - left);
    pointer.setAttribute('x1', pointerX);
    pointer.setAttribute('x2', pointerX);
    const texts = values.map(([name, point]) => name + ' ' + Number(point[1].toPrecision(4)));
    output.textContent = 'step ' + step + ': ' + texts.join(', ');
  };

  svg.onpointerleave = () => {
    output.textContent = '';
    pointer.setAttribute('x1', -9);
    pointer.setAttribute('x2', -9);
  };
}
