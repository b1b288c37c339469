const root=document.documentElement,wanted=new URLSearchParams(location.search).get('theme');
if(wanted)root.dataset.theme=wanted;
document.getElementById('theme').onclick=()=>{const dark=root.dataset.theme?root.dataset.theme==='dark':
matchMedia('(prefers-color-scheme: dark)').matches;root.dataset.theme=dark?'light':'dark'};
for(const svg of document.querySelectorAll('svg[data-plot]')){const data=JSON.parse(svg.dataset.plot),[low,high]=data.x;
const out=svg.parentNode.querySelector('output'),pointer=svg.querySelector('.pointer'),left=58,right=626;
svg.onpointermove=event=>{const box=svg.getBoundingClientRect(),x=(event.clientX-box.left)/box.width*640;
const at=low+(Math.min(Math.max(x,left),right)-left)/(right-left)*(high-low);let step=null;
const texts=data.series.map(one=>{let best=one.points[0];for(const point of one.points)
if(Math.abs(point[0]-at)<Math.abs(best[0]-at))best=point;step??=best[0];return one.name+' '+Number(best[1].toPrecision(4))});
pointer.setAttribute('x1',left+(step-low)/(high-low||1)*(right-left));pointer.setAttribute('x2',pointer.getAttribute('x1'));
out.textContent='step '+step+': '+texts.join(', ')};
svg.onpointerleave=()=>{out.textContent='';pointer.setAttribute('x1',-9);pointer.setAttribute('x2',-9)}}
